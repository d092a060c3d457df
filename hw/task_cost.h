/* SPDX-License-Identifier: Apache-2.0
 * task_cost.h - what a task that computes takes of its device. */
#ifndef TASK_COST_H
#define TASK_COST_H

#include "graph.h"
#include "machine.h"

/* What a list of kernels took on a device; -1: not known yet. Lists are shared by most devices of most layers. */
struct timed_list { struct kernel_cost cost; int32_t device; };

/* timed: [g->n_kernels] by the first kernel of a list. */
struct kernel_cost task_cost(const struct machine *, const struct moe_graph *, const struct task *,
                             struct timed_list *timed);

#endif
