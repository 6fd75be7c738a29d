/* Runs the int8 AMX instructions on a machine without AMX: they raise SIGILL there, and the handler
   computes what the instruction would have and steps over it. For tests of exactness; about one
   microsecond an instruction. Source: Intel 64 and IA-32 SDM, volume 2, chapter on AMX. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, BYTES = 64 };

typedef struct {
  uint8_t data[ROWS][BYTES];
  int rows, bytes;
} Tile;

static __thread Tile tiles[TILES];
static struct sigaction before;

static const int REGISTERS[16] = {
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
};

static void configure(const uint8_t *config) {
  memset(tiles, 0, sizeof tiles);
  for (int t = 0; t < TILES; ++t) {
    tiles[t].bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8;
    tiles[t].rows = config[48 + t];
  }
}

static void multiply(Tile *c, const Tile *a, const Tile *b, int signed_a, int signed_b) {
  for (int m = 0; m < c->rows; ++m)
    for (int k = 0; k < a->bytes / 4; ++k)
      for (int n = 0; n < c->bytes / 4; ++n) {
        int32_t sum;
        memcpy(&sum, &c->data[m][4 * n], 4);
        for (int i = 0; i < 4; ++i) {
          uint8_t x = a->data[m][4 * k + i], y = b->data[k][4 * n + i];
          sum += (signed_a ? (int8_t)x : x) * (signed_b ? (int8_t)y : y);
        }
        memcpy(&c->data[m][4 * n], &sum, 4);
      }
}

/* Length of the instruction at `code` after it was carried out; 0 if it is not ours. */
static int step(const uint8_t *code, greg_t *registers) {
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return 0;
  int r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
  int third = ~(code[2] >> 3) & 15, prefix = code[2] & 3, opcode = code[3];
  int mode = code[4] >> 6, reg = (code[4] >> 3 & 7) | r << 3, low = code[4] & 7, length = 5;
  if (mode == 3) {
    if (opcode == 0x49 && prefix == 0 && code[4] == 0xC0)
      memset(tiles, 0, sizeof tiles);
    else if (opcode == 0x49 && prefix == 3 && low == 0)
      memset(tiles[reg & 7].data, 0, ROWS * BYTES);
    else if (opcode == 0x5E)
      multiply(&tiles[reg & 7], &tiles[low], &tiles[third & 7], prefix >= 2, prefix & 1);
    else
      return 0;
    return length;
  }
  uint8_t *address = 0;
  intptr_t stride = 0;
  if (low == 4) {
    int sib = code[length++], base = (sib & 7) | b << 3, index = (sib >> 3 & 7) | x << 3;
    if ((sib & 7) == 5 && mode == 0) return 0; /* no base: never emitted */
    address = (uint8_t *)registers[REGISTERS[base]];
    if (index != 4) stride = (intptr_t)registers[REGISTERS[index]] << (sib >> 6);
  } else if (low == 5 && mode == 0) { /* relative to the next instruction */
    int32_t far;
    memcpy(&far, code + length, 4);
    length += 4;
    address = (uint8_t *)code + length + far;
  } else {
    address = (uint8_t *)registers[REGISTERS[low | b << 3]];
  }
  if (mode == 1) {
    address += (int8_t)code[length++];
  } else if (mode == 2) {
    int32_t far;
    memcpy(&far, code + length, 4);
    length += 4;
    address += far;
  }
  if (opcode == 0x49 && prefix == 0 && reg == 0) {
    configure(address + stride);
    return length;
  }
  if (opcode != 0x4B || low != 4) return 0;
  Tile *tile = &tiles[reg & 7];
  if (prefix == 2) {
    for (int i = 0; i < tile->rows; ++i) memcpy(address + i * stride, tile->data[i], tile->bytes);
  } else if (prefix == 1 || prefix == 3) {
    memset(tile->data, 0, sizeof tile->data);
    for (int i = 0; i < tile->rows; ++i) memcpy(tile->data[i], address + i * stride, tile->bytes);
  } else {
    return 0;
  }
  return length;
}

static void handle(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  int length = step((const uint8_t *)registers[REG_RIP], registers);
  if (length) {
    registers[REG_RIP] += length;
  } else if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(number, info, context);
  } else {
    sigaction(SIGILL, &before, 0);
  }
}

/* Install the handler; 0 if it worked. */
int amx_emulate(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, &before);
}
