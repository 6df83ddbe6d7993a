"""Accuracy of models on data, agreement of two models, intervals and paired tests."""
