"""What `vtok-fast check` compares: a file for each folder of vtok_fast/ops that has something to check, with
``CHECKS``, which for each of the folder's ops says how one of its backends is compared."""
