/* SPDX-License-Identifier: MIT */
#ifndef MMUNOTIFY_BENCH_PEERS_H
#define MMUNOTIFY_BENCH_PEERS_H

/* What sync.cpp shares with the peers that are measured as C, each in a file of its own. */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a section protects: 1 while it may be read, 0 once a grace period said that nobody reads it. */
struct bench_payload {
  uint64_t value;
};
extern struct bench_payload* bench_shared;

/* Stores that miss the cache: words of a buffer of bench_store_words, by a generator that every case steps alike. */
enum { bench_store_words = 1 << 20 };
static inline uint64_t bench_next_random(uint64_t x) {
  x ^= x << 13;
  x ^= x >> 7;
  return x ^ (x << 17);
}

/* A short loop's time depends on where it lies in the lines of the instruction cache, by a third. So each loop around a
 * section exists four times, `placement` 0 to 3, a quarter of a line apart, and all of them are measured. In a function
 * that is aligned to 64, before the loop: */
#define BENCH_PLACE(placement) __asm__ volatile(".rept %c0\n\tnop\n\t.endr" : : "i"((placement)*16))
enum { bench_placements = 4 };

/* A loop: begins and ends `n` sections; in each it reads the payload. Returns: the sum.
 * ..._amid: with a store that misses the cache before each section; *random is the generator's state. */
uint64_t bench_urcu_sections(uint64_t placement, uint64_t n);
uint64_t bench_urcu_nested(uint64_t placement, uint64_t n);
uint64_t bench_urcu_amid(uint64_t* words, uint64_t* random, uint64_t n);
void bench_urcu_attach(void);
void bench_urcu_detach(void);
void bench_urcu_synchronize(void);
/* Queues `n` callbacks, at most bench_urcu_heads. */
enum { bench_urcu_heads = 1024 };
void bench_urcu_call(uint64_t n);
void bench_urcu_barrier(void);
uint64_t bench_urcu_called(void);
/* Two lists of the same `length` nodes; `n` walks, which call each node's function; the calls since the lists were
 * built. */
void bench_urcu_build(uint64_t length);
void bench_urcu_walk_list(uint64_t n);
void bench_urcu_walk_hlist(uint64_t n);
uint64_t bench_urcu_visits(void);

/* `record`: what bench_ck_attach returned to this thread. */
void* bench_ck_attach(void);
void bench_ck_detach(void* record);
uint64_t bench_ck_sections(void* record, uint64_t placement, uint64_t n);
uint64_t bench_ck_amid(void* record, uint64_t* words, uint64_t* random, uint64_t n);
void bench_ck_synchronize(void* record);
size_t bench_ck_record_size(void);

#ifdef __cplusplus
}
#endif

#endif
