"""Weights for other libraries.

In comes a trained encoder. Out go files in the layout that another library reads.

    detectron2.py  detectron2's weights and configurations
"""
