/*
 * Included before each C++ source of llama.cpp while llama-cpp-python is built (see the Makefile).
 *
 * GCC before 14, 13.3 and 12.4 takes ldtilecfg to read 8 bytes of the 64 that it reads, and leaves
 * out what ggml's AMX kernels write to the others (https://gcc.gnu.org/PR114098): their first
 * product of matrices is a SIGSEGV. The engine looks for the identification below in the library
 * before it lets llama.cpp use these kernels.
 */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
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
