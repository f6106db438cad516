"""What each subcommand of vtok-fast does."""
