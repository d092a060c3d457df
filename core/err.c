/* SPDX-License-Identifier: Apache-2.0
 * err.c - see err.h. */
#include "config.h"

#include "err.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void err_plain(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < ' ' && *text != '\n' && *text != '\t')
            *text = '?';
        else if (*text == 0x7f)
            *text = '?';
}

int err_set(struct err *e, int code, const char *fmt, ...)
{
    if (e->code != 0)
        return e->code;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->text, sizeof e->text, fmt, ap);
    va_end(ap);
    err_plain(e->text);
    e->code = code;
    return code;
}

int err_prefix(struct err *e, const char *fmt, ...)
{
    char old[sizeof e->text];
    memcpy(old, e->text, sizeof old);
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(e->text, sizeof e->text, fmt, ap);
    va_end(ap);
    size_t at = n < 0 ? 0 : (size_t)n;
    if (at + 3 < sizeof e->text) {
        size_t room = sizeof e->text - at - 3, length = strnlen(old, room);
        memcpy(e->text + at, ": ", 2);
        memcpy(e->text + at + 2, old, length);
        e->text[at + 2 + length] = '\0';
    }
    return e->code;
}

int err_exit_code(int code)
{
    return code == 0 ? 0 : code == ERR_RUN ? 1 : 2;
}

char *err_unquote(char *text)
{
    static const char *const quotes[] = { " near ", " 0x", " '\\u" };
    for (size_t i = 0; i < sizeof quotes / sizeof *quotes; i++) {
        char *at = strstr(text, quotes[i]);
        if (at)
            *at = '\0';
    }
    return text;
}

/* Levenshtein distance, two rows; names here are short. */
static int edit_distance(const char *a, const char *b)
{
    enum { MAX = 64 };
    size_t n = strlen(a), m = strlen(b);
    if (n >= MAX || m >= MAX)
        return MAX;
    int row[MAX + 1];
    for (size_t j = 0; j <= m; j++)
        row[j] = (int)j;
    for (size_t i = 1; i <= n; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= m; j++) {
            int above = row[j];
            int best = diagonal + (a[i - 1] != b[j - 1]);
            if (above + 1 < best)
                best = above + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
            diagonal = above;
        }
    }
    return row[m];
}

const char *err_nearest(const char *name, const char *const *candidates, int n)
{
    const char *best = NULL;
    int best_distance = (int)strlen(name) / 3 + 2; /* further away than this is no help */
    for (int i = 0; i < n; i++) {
        int d = edit_distance(name, candidates[i]);
        if (d < best_distance) {
            best_distance = d;
            best = candidates[i];
        }
    }
    size_t length = strlen(name);
    for (int i = 0; i < n && !best && length >= 3; i++) /* the beginning of a long name is far from all of it */
        if (!strncmp(name, candidates[i], length))
            best = candidates[i];
    return best;
}
