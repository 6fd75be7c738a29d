/* Counts what a process allocates: LD_PRELOAD=allocations.so; see overhead.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <sys/mman.h>

long allocations_count = 0, allocations_bytes = 0, mappings_count = 0;

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static void note(size_t bytes) {
  __atomic_fetch_add(&allocations_count, 1, __ATOMIC_RELAXED);
  __atomic_fetch_add(&allocations_bytes, bytes, __ATOMIC_RELAXED);
}

void *malloc(size_t n) { note(n); return __libc_malloc(n); }
void *calloc(size_t n, size_t m) { note(n * m); return __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { note(n); return __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { note(n); return __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { note(n); return __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
  note(n);
  *p = __libc_memalign(a, n);
  return *p == NULL;
}
