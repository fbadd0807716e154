/*
 * Included before each C++ source of llama.cpp while llama-cpp-python is built (see the Makefile):
 * what its CPU kernels need on Intel's CPUs with AMX.
 */
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
