"""Accuracy of models on data, agreement of two models, confidence intervals and paired tests."""
