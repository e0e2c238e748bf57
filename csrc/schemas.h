// The schemas of the compiled ops. ops.cpp defines them as gptdist_c::*; the test device (ptxvm/test_device.cpp) defines
// the same ones under a name of its own.
#pragma once

namespace gptdist {

constexpr const char* kSchemas[] = {
    // Statistics, losses and parameters' gradients are fp32; dbias is empty without a bias. Both devices:
    "bias_gelu_fwd(Tensor x, Tensor? bias) -> Tensor",
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)",
    // One tensor of each list for each parameter; shadows is empty where none are wanted.
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] shadows,"
    " Tensor? grad_scale, float lr, float beta1, float beta2, float eps, float weight_decay, int step) -> ()",
    "grad_norm(Tensor[] tensors) -> Tensor",
    "dropout(Tensor x, float p, Tensor key, Tensor sample_ids, int site, int row_offset) -> Tensor",
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, bool has_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "residual_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    "residual_layer_norm_bwd(Tensor dy, Tensor ds, Tensor sum, Tensor mean, Tensor rstd, Tensor weight, bool has_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    // The second backward overwrites the logits with their gradient.
    "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index) -> (Tensor loss, Tensor lse)",
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, int ignore_index) -> Tensor",
    "cross_entropy_bwd_(Tensor dloss, Tensor(a!) logits, Tensor targets, Tensor lse, int ignore_index) -> ()",
    // CPU only. A linear layer for up to 8 rows of x. layer_norm of fp32 x with y in bf16; logits that become their gradient for a dloss of 1 with the pass that
    // finds loss and lse; out = (x + addend) scale, where out and addend may be one tensor.
    "few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "layer_norm_to_bf16_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, int ignore_index) -> (Tensor loss, Tensor lse)",
    "scaled_sum_(Tensor(a!) out, Tensor x, Tensor? addend, float scale) -> ()",
    // qkv (B, T, Hkv, G+2, D) gives out (B, T, Hkv, G, D) and lse (B, Hkv, G, T), which is fp32.
    "attention_fwd(Tensor qkv, bool causal, Tensor? doc_start, float p, Tensor? key, Tensor? sample_ids, int site,"
    " int head_offset) -> (Tensor out, Tensor lse)",
    "attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, bool causal, Tensor? doc_start, float p, Tensor? key,"
    " Tensor? sample_ids, int site, int head_offset) -> Tensor",
    // q (B, Tq, Hkv, G, D), caches (pages, page, Hkv, D), block_table int32 (B, P), lengths int64 (B,).
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor lengths) -> Tensor",
    // CUDA versions (1000 major + 10 minor) of the runtime that _C_cuda holds and of this machine's driver; 0: none.
    "cuda_versions() -> (int runtime, int driver)",
};

}  // namespace gptdist
