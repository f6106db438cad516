"""Video files in and out, by PyAV: frames as the tensors the models take, when they are shown, and back.

Everything here needs the package `av`, which `pip install "vtok-fast[demo]"` brings.
"""

from vtok_fast.io.video.decode import Problem
from vtok_fast.io.video.errors import VideoError
from vtok_fast.io.video.frames import Clip, Picture, Reading, Window
from vtok_fast.io.video.pixels import to_float, to_uint8
from vtok_fast.io.video.reader import open_video, read_video
from vtok_fast.io.video.timing import Times
from vtok_fast.io.video.writer import join_videos, write_video

__all__ = [
    "Clip",
    "Picture",
    "Problem",
    "Reading",
    "Times",
    "VideoError",
    "Window",
    "join_videos",
    "open_video",
    "read_video",
    "to_float",
    "to_uint8",
    "write_video",
]
