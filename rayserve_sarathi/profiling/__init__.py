"""Measure how long the operators of a model take on the present device: what `sarathi profile` writes."""
