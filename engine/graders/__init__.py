"""Folders that the official graders of GenEval, DPG-Bench, WISE and ImgEdit accept."""
