// The schemas of the compiled ops. ops.cpp defines them as gptdist_c::*; the test device (ptxvm/test_device.cpp) defines
// the same ones under a name of its own.
#pragma once

namespace gptdist {

constexpr const char* kSchemas[] = {
    // Both devices. dbias is fp32, and empty without a bias.
    "bias_gelu_fwd(Tensor x, Tensor? bias) -> Tensor",
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)",
    // CUDA only. mean, rstd, dweight and dbias are fp32; dbias is empty without a bias.
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, bool has_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "residual_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    "residual_layer_norm_bwd(Tensor dy, Tensor ds, Tensor sum, Tensor mean, Tensor rstd, Tensor weight, bool has_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    // loss and lse are fp32. The second backward overwrites the logits with their gradient.
    "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index) -> (Tensor loss, Tensor lse)",
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, int ignore_index) -> Tensor",
    "cross_entropy_bwd_(Tensor dloss, Tensor(a!) logits, Tensor targets, Tensor lse, int ignore_index) -> ()",
    "dropout(Tensor x, float p, Tensor key, Tensor sample_ids, int site, int row_offset) -> Tensor",
    // qkv (B, T, Hkv, G+2, D) gives out (B, T, Hkv, G, D) and lse (B, Hkv, G, T), which is fp32.
    "attention_fwd(Tensor qkv, bool causal, Tensor? doc_start, float p, Tensor? key, Tensor? sample_ids, int site,"
    " int head_offset) -> (Tensor out, Tensor lse)",
    "attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, bool causal, Tensor? doc_start, float p, Tensor? key,"
    " Tensor? sample_ids, int site, int head_offset) -> Tensor",
    // q (B, Tq, Hkv, G, D), caches (pages, page, Hkv, D), block_table int32 (B, P), lengths int64 (B,); the output is like q.
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor lengths) -> Tensor",
    // CUDA versions (1000 major + 10 minor) of the runtime that _C_cuda holds and of this machine's driver; 0: none.
    "cuda_versions() -> (int runtime, int driver)",
};

}  // namespace gptdist
