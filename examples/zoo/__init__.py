"""Tiny random models to try fxpass on, and an eager norm counter to judge it with.

counting    executed norms, counted in eager by following the data (knows nothing of fxpass)
shrink      a tiny copy of any transformers configuration
hf          build a transformers model type and inputs for it
dif         the same for diffusers transformer classes
sites       one norm of a model cut out, with the residual add before it
compare     eager against a compiled form: elements that differ, rows that depend on the batch
"""
