/* SPDX-License-Identifier: Apache-2.0
 * csv.h - small tables from files: a header, comments with #, no quotes. */
#ifndef CSV_H
#define CSV_H

#include "err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CSV_COLUMNS = 16 };

struct csv_row { int line; const char *cell[CSV_COLUMNS]; };

struct csv {
    char file[512];
    char *text;                         /* cells point into it */
    int n_columns, n_rows, header;      /* header: its line */
    const char *column[CSV_COLUMNS];
    struct csv_row *row;
    int n_comments;
    const char **comment;               /* lines with # in order, without it */
};

/* Every row has as many cells as the header; blanks around cells are dropped. */
int csv_read(struct csv *, const char *file, struct err *);
/* The same for a file that messages call by another name. */
int csv_read_as(struct csv *, const char *path, const char *name, struct err *);
void csv_free(struct csv *);
/* Whether the header is exactly these columns, in this order; ends with NULL. */
bool csv_is(const struct csv *, const char *const *columns);
/* A cell's text; NULL: no such column. */
const char *csv_cell(const struct csv *, int row, const char *column);
/* Cell as a whole number within [min, max]. */
int csv_whole(const struct csv *, int row, const char *column, int64_t min, int64_t max, int64_t *out, struct err *);
/* Cell as a finite number within [min, max]; 0 or an error that names file, line and column. */
int csv_number(const struct csv *, int row, const char *column, double min, double max, double *out, struct err *);
/* Cell as one of the words, which end with NULL: its index. */
int csv_word(const struct csv *, int row, const char *column, const char *const *words, int *out, struct err *);
/* Text of the comments "key: text", joined by blanks; "" if there is none. */
void csv_note(const struct csv *, const char *key, char *text, size_t room);

#endif
