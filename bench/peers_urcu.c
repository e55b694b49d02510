/* SPDX-License-Identifier: MIT */

/* liburcu, the flavour with membarrier, its sections inlined: C, because its headers cost a C++ program more (their
 * thread-local variables are then reached through a function that tests for an initialiser). */

#define _LGPL_SOURCE
#define URCU_INLINE_SMALL_FUNCTIONS

#include <stdlib.h>

#include <urcu/urcu-memb.h>
#include <urcu/rcuhlist.h>
#include <urcu/rculist.h>

#include "peers.h"

static inline uint64_t read_payload(void) { return CMM_LOAD_SHARED(rcu_dereference(bench_shared)->value); }

#define SECTIONS(placement)                                                                 \
  static uint64_t __attribute__((noinline, aligned(64))) sections_##placement(uint64_t n) { \
    uint64_t sum = 0;                                                                       \
    BENCH_PLACE(placement);                                                                 \
    for (uint64_t i = 0; i < n; ++i) {                                                      \
      urcu_memb_read_lock();                                                                \
      sum += read_payload();                                                                \
      urcu_memb_read_unlock();                                                              \
    }                                                                                       \
    return sum;                                                                             \
  }
SECTIONS(0)
SECTIONS(1)
SECTIONS(2)
SECTIONS(3)

uint64_t bench_urcu_sections(uint64_t placement, uint64_t n) {
  static uint64_t (*const all[bench_placements])(uint64_t) = {sections_0, sections_1, sections_2, sections_3};
  return all[placement](n);
}

uint64_t bench_urcu_nested(uint64_t placement, uint64_t n) {
  urcu_memb_read_lock();
  const uint64_t sum = bench_urcu_sections(placement, n);
  urcu_memb_read_unlock();
  return sum;
}

uint64_t bench_urcu_amid(uint64_t* words, uint64_t* random, uint64_t n) {
  uint64_t x = *random;
  uint64_t sum = 0;
  for (uint64_t i = 0; i < n; ++i) {
    x = bench_next_random(x);
    words[x % bench_store_words] = x;
    urcu_memb_read_lock();
    sum += read_payload();
    urcu_memb_read_unlock();
  }
  *random = x;
  return sum;
}

void bench_urcu_attach(void) { urcu_memb_register_thread(); }
void bench_urcu_detach(void) { urcu_memb_unregister_thread(); }
void bench_urcu_synchronize(void) { urcu_memb_synchronize_rcu(); }

static struct rcu_head heads[bench_urcu_heads];
static uint64_t called; /* by liburcu's one worker thread; read after a barrier */

static void count_call(struct rcu_head* head) {
  (void)head;
  CMM_STORE_SHARED(called, called + 1);
}

void bench_urcu_call(uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) urcu_memb_call_rcu(&heads[i], count_call);
}
void bench_urcu_barrier(void) { urcu_memb_barrier(); }
uint64_t bench_urcu_called(void) { return CMM_LOAD_SHARED(called); }

struct node {
  void (*function)(struct node*);
  uint64_t calls;
  struct cds_list_head list;
  struct cds_hlist_node hlist;
};
enum { most_nodes = 64 };
static struct node nodes[most_nodes];
static CDS_LIST_HEAD(list);
static struct cds_hlist_head hlist;

static void count_visit(struct node* visited) { ++visited->calls; }

void bench_urcu_build(uint64_t length) {
  CDS_INIT_LIST_HEAD(&list);
  CDS_INIT_HLIST_HEAD(&hlist);
  for (uint64_t i = 0; i < most_nodes; ++i) nodes[i].calls = 0;
  for (uint64_t i = 0; i < length && i < most_nodes; ++i) {
    nodes[i].function = count_visit;
    cds_list_add_rcu(&nodes[i].list, &list);
    cds_hlist_add_head_rcu(&nodes[i].hlist, &hlist);
  }
}

uint64_t bench_urcu_visits(void) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < most_nodes; ++i) sum += nodes[i].calls;
  return sum;
}

void bench_urcu_walk_list(uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) {
    struct node* each;
    urcu_memb_read_lock();
    cds_list_for_each_entry_rcu(each, &list, list) each->function(each);
    urcu_memb_read_unlock();
  }
}

void bench_urcu_walk_hlist(uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) {
    struct cds_hlist_node* link;
    urcu_memb_read_lock();
    cds_hlist_for_each_rcu(link, &hlist) {
      struct node* const each = cds_hlist_entry(link, struct node, hlist);
      each->function(each);
    }
    urcu_memb_read_unlock();
  }
}
