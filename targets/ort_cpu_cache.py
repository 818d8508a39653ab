"""Whether this build of ONNX Runtime keeps keys and values in codes: asked of its kernel."""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

_HEADS: Final = 2
_SIZE: Final = 8
_TOKENS: Final = 4
STORED: Final = {8: ("int8", _SIZE), 4: ("uint8", _SIZE // 2)}
"""By bits: the type of the cache, and the length of its last axis."""


@functools.cache
def cached_codes_obstacle(bits: int) -> str | None:
    """Why keys and values cannot be kept in codes of `bits`, or None.

    One token is put behind three that are in the cache, with scales per channel. The codes must be
    the nearest ones, and the result that of attention over what the codes stand for.
    """
    rng = np.random.default_rng(0)
    type_, width = STORED[bits]
    last = 2 ** (bits - 1) - 1
    codes = rng.integers(-last, last + 1, (2, _HEADS, _TOKENS, _SIZE))
    scales = rng.uniform(0.5, 2.0, (2, 1, _HEADS, 1, _SIZE)).astype(np.float32) / last
    keys, values = codes * scales[:, 0]
    query = rng.standard_normal((_HEADS, 1, _SIZE)).astype(np.float32)
    stored = [_packed(part, bits)[None].astype(type_) for part in codes]
    feed = {
        "q": query.reshape(1, 1, -1),
        "k": keys[:, -1].reshape(1, 1, -1).astype(np.float32),
        "v": values[:, -1].reshape(1, 1, -1).astype(np.float32),
        "past_k": stored[0][:, :, :-1],
        "past_v": stored[1][:, :, :-1],
        "last": np.array([_TOKENS - 1], np.int32),
        "total": np.array(_TOKENS, np.int32),
        "k_scale": scales[0],
        "v_scale": scales[1],
    }
    try:
        found, *present = _session(bits, type_, width).run(None, feed)
    except Exception as error:  # onnxruntime raises its own, unexported types
        detail = " ".join(str(error).split())
        return f"ONNX Runtime {ort.__version__} has no attention on a cache of it here: {detail}"
    if not all(np.array_equal(a, b) for a, b in zip(present, stored, strict=True)):
        return f"ONNX Runtime {ort.__version__} makes other codes of keys and values here"
    scores = np.exp(query @ keys.swapaxes(1, 2) / np.sqrt(_SIZE))
    wanted = (scores / scores.sum(-1, keepdims=True)) @ values
    if not np.allclose(found.reshape(wanted.shape), wanted, rtol=0, atol=1e-4):
        return f"ONNX Runtime {ort.__version__} computes with other codes than it keeps here"
    return None


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """`codes` as they are stored: of 4 bits, offset by 8, the even channel in the low half."""
    return codes if bits == 8 else (codes[..., 0::2] + 8) | (codes[..., 1::2] + 8) << 4


def _session(bits: int, type_: str, width: int) -> ort.InferenceSession:
    wide, scale = f"float[1, 1, {_HEADS * _SIZE}]", f"float[1, {_HEADS}, 1, {_SIZE}]"
    past = f"{type_}[1, {_HEADS}, {_TOKENS - 1}, {width}]"
    kept = f"{type_}[1, {_HEADS}, {_TOKENS}, {width}]"
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        probe ({wide} q, {wide} k, {wide} v, {past} past_k, {past} past_v, int32[1] last,
               int32 total, {scale} k_scale, {scale} v_scale) => ({wide} y, {kept} kk, {kept} vv) {{
          y, kk, vv = com.microsoft.GroupQueryAttention
            <num_heads = {_HEADS}, kv_num_heads = {_HEADS}, k_quant_type = "PER_CHANNEL",
             v_quant_type = "PER_CHANNEL", kv_cache_bit_width = {bits}>
            (q, k, v, past_k, past_v, last, total, , , , , , k_scale, v_scale) }}"""
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it logs as an error it raises too
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
