/* SPDX-License-Identifier: Apache-2.0
 * child.h - policies run in processes of their own, which a policy may crash, end or never leave: what such a process
 * does first, how it answers, and what its parent says of one that did not. */
#ifndef CHILD_H
#define CHILD_H

#include "policy.h"
#include <stdbool.h>

/* In the child: ends with its parent, notes there what it is doing (see policy_note_to), and keeps what policies print
 * away from standard output, which is for results. */
void child_begin(volatile struct policy_note *);
/* The child's answer; false: the parent no longer listens. */
bool child_write(int fd, const char *text, size_t n);
/* Why there was no answer: "router bad, in route: crashed: Aborted". status: of waitpid(); timeout_s: what the child
 * did not keep to, 0 if it did. */
void child_fault(const volatile struct policy_note *, int status, double timeout_s, char *text, size_t room);

#endif
