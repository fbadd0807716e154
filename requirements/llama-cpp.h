/*
 * Included before each source of llama.cpp while llama-cpp-python is built (see llama-cpp.sh).
 */
#ifdef __cplusplus
#if defined(__AVX512FP16__)
/*
 * With it ggml adds up the values of attention 128 at a time, and what is left one by one: heads of
 * 64, which are SmolLM2's and many small models', take 32 ns a key instead of 7. Heads of 128 take 5
 * instead of 8.
 */
#undef __AVX512FP16__
#endif

#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
/*
 * GCC before 14, 13.3 and 12.4 takes ldtilecfg to read 8 bytes of the 64 that it reads, and leaves
 * out what ggml's AMX kernels write to the others (https://gcc.gnu.org/PR114098): their first
 * product of matrices is a SIGSEGV. The engine looks for the identification below in the library
 * before it lets llama.cpp use these kernels.
 */
#include <immintrin.h>

struct __attribute__((may_alias)) tile_configuration_bytes {
    unsigned char bytes[64];
};

#define _tile_loadconfig(configuration)   \
    __asm__ volatile("ldtilecfg %0"       \
                     :                    \
                     : "m"(*reinterpret_cast<const tile_configuration_bytes *>(configuration)))

__asm__(".ident \"ldtilecfg: 64 bytes\"");
#endif

#else
/*
 * In C only ggml's product of matrices calls llamafile_sgemm, which is C++. With this it calls
 * rust/matmul, which calls llamafile_sgemm. Once ggml declares it otherwise, this does not compile.
 */
#define llamafile_sgemm inferpool_mul_mat

struct ggml_compute_params;
_Bool llamafile_sgemm(const struct ggml_compute_params *params, __INT64_TYPE__ m, __INT64_TYPE__ n,
                      __INT64_TYPE__ k, const void *a, __INT64_TYPE__ lda, const void *b,
                      __INT64_TYPE__ ldb, void *c, __INT64_TYPE__ ldc, int a_type, int b_type,
                      int c_type);
#endif
