"""`onnx-edge`: standard ONNX with QuantizeLinear and DequantizeLinear around every quantised op.

The other targets quantise the Linears of a transformer and then use their runtime's own operators.
Providers of edge devices take standard operators only, of any kind of model, and every tensor
between quantised operators has codes of its own. So what is decided here is of tensors:
`qcompile.edge.pipeline` reads from top to bottom.
"""
