/* SPDX-License-Identifier: MIT */

/* Concurrency Kit's epochs, without a ck_epoch_section (which costs a pair 3 ns more). */

#include <stdlib.h>

#include <ck_epoch.h>

#include "peers.h"

static ck_epoch_t epoch;

static inline uint64_t read_payload(void) {
  const struct bench_payload* payload = ck_pr_load_ptr(&bench_shared);
  return ck_pr_load_64(&payload->value);
}

static void __attribute__((constructor)) make_epoch(void) { ck_epoch_init(&epoch); }

void* bench_ck_attach(void) {
  ck_epoch_record_t* record = ck_epoch_recycle(&epoch, NULL);
  if (record == NULL) {
    record = aligned_alloc(64, (sizeof *record + 63) / 64 * 64); /* never freed: the epoch lists it for ever */
    if (record == NULL) abort();
    ck_epoch_register(&epoch, record, NULL);
  }
  return record;
}
void bench_ck_detach(void* record) { ck_epoch_unregister(record); }

#define SECTIONS(placement)                                                                                            \
  static uint64_t __attribute__((noinline, aligned(64))) sections_##placement(ck_epoch_record_t* record, uint64_t n) { \
    uint64_t sum = 0;                                                                                                  \
    BENCH_PLACE(placement);                                                                                            \
    for (uint64_t i = 0; i < n; ++i) {                                                                                 \
      ck_epoch_begin(record, NULL);                                                                                    \
      sum += read_payload();                                                                                           \
      ck_epoch_end(record, NULL);                                                                                      \
    }                                                                                                                  \
    return sum;                                                                                                        \
  }
SECTIONS(0)
SECTIONS(1)
SECTIONS(2)
SECTIONS(3)

uint64_t bench_ck_sections(void* record, uint64_t placement, uint64_t n) {
  static uint64_t (*const all[bench_placements])(ck_epoch_record_t*, uint64_t) = {sections_0, sections_1, sections_2,
                                                                                  sections_3};
  return all[placement](record, n);
}

uint64_t bench_ck_amid(void* record, uint64_t* words, uint64_t* random, uint64_t n) {
  uint64_t x = *random;
  uint64_t sum = 0;
  for (uint64_t i = 0; i < n; ++i) {
    x = bench_next_random(x);
    words[x % bench_store_words] = x;
    ck_epoch_begin(record, NULL);
    sum += read_payload();
    ck_epoch_end(record, NULL);
  }
  *random = x;
  return sum;
}

void bench_ck_synchronize(void* record) { ck_epoch_synchronize(record); }
size_t bench_ck_record_size(void) { return sizeof(ck_epoch_record_t); }
