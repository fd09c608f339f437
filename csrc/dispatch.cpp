#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace prosparse {

extern const Kernels kernels_generic;
#ifdef PROSPARSE_HAS_avx2
extern const Kernels kernels_avx2;
#endif
#ifdef PROSPARSE_HAS_avx512vnni
extern const Kernels kernels_avx512vnni;
#endif
#ifdef PROSPARSE_HAS_avx512
extern const Kernels kernels_avx512;
#endif
#ifdef PROSPARSE_HAS_neon
extern const Kernels kernels_neon;
#endif

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> usable = {&kernels_generic};
#ifdef PROSPARSE_HAS_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        usable.push_back(&kernels_avx2);
#endif
#ifdef PROSPARSE_HAS_avx512vnni
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        usable.push_back(&kernels_avx512vnni);
#ifdef PROSPARSE_HAS_avx512
        if (__builtin_cpu_supports("avx512bf16")) usable.push_back(&kernels_avx512);
#endif
    }
#endif
#ifdef PROSPARSE_HAS_neon
    usable.push_back(&kernels_neon);
#endif
    return usable;
}

const Kernels& kernels() {
    static const Kernels* chosen = [] {
        auto usable = usable_kernels();
        const char* wanted = std::getenv("PROSPARSE_ISA");
        if (!wanted || !*wanted) return usable.back();
        std::string names;
        for (auto* k : usable) {
            if (std::string(wanted) == k->isa) return k;
            names += std::string(names.empty() ? "" : ", ") + k->isa;
        }
        throw std::invalid_argument("PROSPARSE_ISA=" + std::string(wanted) +
                                    " cannot run here; use one of: " + names);
    }();
    return *chosen;
}

}  // namespace prosparse
