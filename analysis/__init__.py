"""Measures of adapted models: numbers first, drawings from the numbers."""

from analysis.parameters import METHODS, LayerShape, ParameterCount, count, layer_shapes

__all__ = ["METHODS", "LayerShape", "ParameterCount", "count", "layer_shapes"]
