"""The code that an exported student carries: copied as it is into the folder, where `trust_remote_code` imports it.

It needs torch and transformers and nothing of this project; `student/export.py` writes the weights it reads.
"""
