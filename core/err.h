/* SPDX-License-Identifier: Apache-2.0
 * err.h - one error on its way up. The first one wins: later calls keep the text that says where it began. */
#ifndef ERR_H
#define ERR_H

enum err_code {
    ERR_INPUT = -1,  /* bad usage or input: exit 2 */
    ERR_MEMORY = -2,
    ERR_IO = -3,     /* disk full, permission, a process that died: exit 2 */
    ERR_RUN = -4     /* a run or a check failed: exit 1 */
};

struct err { int code; char text[1024]; };

/* Returns `code`, so that callers can `return err_set(...)`. */
int err_set(struct err *, int code, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* Puts "prefix: " in front of the text that is there. Returns the code. */
int err_prefix(struct err *, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* 0 for code 0, else the process's exit code: 1 for ERR_RUN, 2 for the rest. */
int err_exit_code(int code);
/* What files and command lines hold is quoted, and does not move the cursor of who reads it: a ? for each control
 * character but ends of lines and tabs. */
void err_plain(char *text);
/* Cuts off a parser's message, in place, what it quotes of its input: jansson and Lua both end theirs with "near" and
 * the words they found. A scenario may name any file, and must not read it in messages. Returns `text`. */
char *err_unquote(char *text);
/* The candidate nearest to `name` by edit distance, else the first that begins with it; NULL if none is near (for "did
 * you mean"). */
const char *err_nearest(const char *name, const char *const *candidates, int n);

#endif
