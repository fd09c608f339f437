// One exported symbol per instruction set: its table of kernels.
#include "units.h"

#define PS_STRING_(x) #x
#define PS_STRING(x) PS_STRING_(x)

namespace prosparse {

extern const Kernels PS_CAT(kernels_, PROSPARSE_ISA);
const Kernels PS_CAT(kernels_, PROSPARSE_ISA) = {
    .isa = PS_STRING(PROSPARSE_ISA),
    .panel = PS_NS::kPanel,
    .token_tile = PS_NS::kTokenTile,
    .quantize = PS_NS::quantize,
    .matvec = PS_NS::matvec,
    .dot_two = PS_NS::dot_two,
    .dot = PS_NS::dot,
    .dequantize = PS_NS::dequantize,
    .down = PS_NS::down,
    .gemm_a_bytes = PS_NS::gemm_a_bytes,
    .gemm_scratch_bytes = PS_NS::gemm_scratch_bytes,
    .gemm_pack_a = PS_NS::gemm_pack_a,
    .gemm = PS_NS::gemm,
    .gemm_down = PS_NS::gemm_down,
    .attend = PS_NS::attend,
    .rmsnorm = PS_NS::rmsnorm,
    .rope = PS_NS::rope,
    .to_half = PS_NS::to_half,
    .add = PS_NS::add,
    .activate = PS_NS::activate_all,
    .multiply = PS_NS::multiply,
    .sign_scores = PS_NS::sign_scores,
    .read = PS_NS::read,
};

}  // namespace prosparse
