// What the machine can do: int8 products in registers, and reading memory. One thread.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

#define TIMES(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define COUNT 14
#define VNNI(i) "vpdpbusd %%zmm1, %%zmm0, %%zmm" #i "\n\t"
#define ADD2(i) "vpmaddwd %%ymm1, %%ymm0, %%ymm15\n\tvpaddd %%ymm15, %%ymm" #i ", %%ymm" #i "\n\t"
#define GONE "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
             "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

// Multiply-adds a second of vpdpbusd on 512 bits.
double peak_avx512_vnni(long steps) {
    double start = now();
    for (long i = 0; i < steps; i++) __asm__ volatile(TIMES(VNNI)::: GONE);
    return (double)steps * COUNT * 64 / (now() - start);
}

// Multiply-adds a second of vpmaddwd and vpaddd on 256 bits.
double peak_avx2(long steps) {
    double start = now();
    for (long i = 0; i < steps; i++) __asm__ volatile(TIMES(ADD2)::: GONE);
    return (double)steps * COUNT * 16 / (now() - start);
}

#ifdef __AMX_INT8__
// Multiply-adds a second of tdpbssd on 16 x 16 x 64 tiles; the caller has asked for permission.
double peak_amx_int8(long steps) {
    struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles;
    memset(&tiles, 0, sizeof tiles);
    tiles.palette = 1;
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
    double start = now();
    for (long i = 0; i < steps; i++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    double seconds = now() - start;
    _tile_release();
    return (double)steps * 4 * 16 * 16 * 64 / seconds;
}
#endif

// Bytes read a second; `words` is 8-byte words.
double read_bandwidth(const uint64_t *data, long words, uint64_t *sink) {
    uint64_t sum[8] = {0};
    double start = now();
    for (long i = 0; i + 64 <= words; i += 64) {
        for (int line = 0; line < 8; line++)
            for (int j = 0; j < 8; j++) sum[j] += data[i + 8 * line + j];
    }
    double seconds = now() - start;
    for (int j = 0; j < 8; j++) *sink += sum[j];
    return 8.0 * words / seconds;
}
