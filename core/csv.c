/* SPDX-License-Identifier: Apache-2.0
 * csv.c - reads small tables strictly: a wrong cell is an error that names file, line and column. */
#include "config.h"

#include "csv.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BYTES = 16 << 20 };

static char *read_text(const char *path, const char *file, struct err *e)
{
    FILE *f = fopen(path, "rb");
    char *text = f ? malloc(MAX_BYTES + 1) : NULL;
    if (!f) {
        err_set(e, ERR_INPUT, "%s: %s", file, strerror(errno));
        return NULL;
    }
    size_t n = text ? fread(text, 1, MAX_BYTES + 1, f) : 0;
    if (!text)
        err_set(e, ERR_MEMORY, "%s: out of memory", file);
    else if (ferror(f))
        err_set(e, ERR_INPUT, "%s: cannot be read", file);
    else if (n > MAX_BYTES)
        err_set(e, ERR_INPUT, "%s: more than %d bytes, which is no small table", file, MAX_BYTES);
    else if (memchr(text, '\0', n))
        err_set(e, ERR_INPUT, "%s: holds zero bytes: not text", file);
    fclose(f);
    if (e->code) {
        free(text);
        return NULL;
    }
    text[n] = '\0';
    return text;
}

static char *trim(char *s)
{
    while (isspace((unsigned char)*s))
        s++;
    for (size_t n = strlen(s); n > 0 && isspace((unsigned char)s[n - 1]); n--)
        s[n - 1] = '\0';
    return s;
}

/* Cuts a line at its commas; how many cells, or -1 if there are too many. */
static int cut(char *line, const char *cell[CSV_COLUMNS])
{
    int n = 0;
    for (char *at = line; at; n++) {
        char *comma = strchr(at, ',');
        if (n == CSV_COLUMNS)
            return -1;
        if (comma)
            *comma++ = '\0';
        cell[n] = trim(at);
        at = comma;
    }
    return n;
}

static int grow(struct csv *c, struct err *e)
{
    if ((c->n_rows & (c->n_rows + 1)) == 0 || c->n_rows == 0) { /* room doubles at 1, 3, 7, ... */
        struct csv_row *row = realloc(c->row, sizeof *row * (size_t)(2 * c->n_rows + 2));
        if (!row)
            return err_set(e, ERR_MEMORY, "%s: out of memory", c->file);
        c->row = row;
    }
    return 0;
}

static int take_line(struct csv *c, char *text, int line, struct err *e)
{
    struct csv_row row = { .line = line };
    int n = cut(text, row.cell);
    if (n < 0 || (c->n_columns > 0 && n != c->n_columns))
        return err_set(e, ERR_INPUT, "%s:%d: found %s%d cells, expected %d", c->file, line, n < 0 ? "more than " : "",
                       n < 0 ? CSV_COLUMNS : n, c->n_columns > 0 ? c->n_columns : CSV_COLUMNS);
    if (c->n_columns == 0) {
        memcpy(c->column, row.cell, sizeof c->column);
        c->n_columns = n;
        c->header = line;
        return 0;
    }
    if (grow(c, e) < 0)
        return e->code;
    c->row[c->n_rows++] = row;
    return 0;
}

int csv_read(struct csv *c, const char *file, struct err *e)
{
    return csv_read_as(c, file, file, e);
}

int csv_read_as(struct csv *c, const char *path, const char *file, struct err *e)
{
    memset(c, 0, sizeof *c);
    snprintf(c->file, sizeof c->file, "%s", file);
    if (!(c->text = read_text(path, file, e)))
        return e->code;
    int line = 0, n_lines = 1;
    for (const char *s = c->text; *s; s++)
        n_lines += *s == '\n';
    if (!(c->comment = calloc((size_t)n_lines, sizeof *c->comment)))
        err_set(e, ERR_MEMORY, "%s: out of memory", file);
    for (char *at = c->text, *next; at && !e->code; at = next) {
        line++;
        if ((next = strchr(at, '\n')))
            *next++ = '\0';
        at = trim(at);
        if (*at == '#')
            c->comment[c->n_comments++] = trim(at + 1);
        else if (*at)
            take_line(c, at, line, e);
    }
    if (!e->code && c->n_rows == 0)
        err_set(e, ERR_INPUT, "%s: found %s, expected a header and rows", file,
                c->n_columns ? "a header alone" : "nothing");
    if (e->code)
        csv_free(c);
    return e->code;
}

void csv_free(struct csv *c)
{
    free(c->text);
    free(c->row);
    free(c->comment);
    memset(c, 0, sizeof *c);
}

bool csv_is(const struct csv *c, const char *const *columns)
{
    int n = 0;
    while (columns[n] && n < c->n_columns && !strcmp(columns[n], c->column[n]))
        n++;
    return !columns[n] && n == c->n_columns;
}

static int column_of(const struct csv *c, const char *column, struct err *e)
{
    for (int i = 0; i < c->n_columns; i++)
        if (!strcmp(c->column[i], column))
            return i;
    err_set(e, ERR_INPUT, "%s: column %s is missing", c->file, column);
    return -1;
}

const char *csv_cell(const struct csv *c, int row, const char *column)
{
    for (int i = 0; i < c->n_columns; i++)
        if (!strcmp(c->column[i], column))
            return c->row[row].cell[i];
    return NULL;
}

int csv_whole(const struct csv *c, int row, const char *column, int64_t min, int64_t max, int64_t *out, struct err *e)
{
    int i = column_of(c, column, e);
    if (i < 0)
        return e->code;
    const char *cell = c->row[row].cell[i];
    char *end;
    errno = 0;
    const long long x = strtoll(cell, &end, 10);
    if (end == cell || *end || errno || x < min || x > max)
        return err_set(e, ERR_INPUT, "%s:%d: %s: found \"%.40s\", expected a whole number from %lld to %lld", c->file,
                       c->row[row].line, column, cell, (long long)min, (long long)max);
    *out = x;
    return 0;
}

int csv_number(const struct csv *c, int row, const char *column, double min, double max, double *out, struct err *e)
{
    int i = column_of(c, column, e);
    if (i < 0)
        return e->code;
    const char *cell = c->row[row].cell[i];
    char *end;
    *out = strtod(cell, &end);
    if (*cell == '\0' || *end != '\0' || !(*out >= min && *out <= max) || !isfinite(*out))
        return err_set(e, ERR_INPUT, "%s:%d: %s: found \"%.40s\", expected a number from %g to %g", c->file,
                       c->row[row].line, column, cell, min, max);
    return 0;
}

int csv_word(const struct csv *c, int row, const char *column, const char *const *words, int *out, struct err *e)
{
    int i = column_of(c, column, e), n = 0;
    char list[200] = "";
    if (i < 0)
        return e->code;
    for (*out = 0; words[*out]; ++*out)
        if (!strcmp(words[*out], c->row[row].cell[i]))
            return 0;
    for (; words[n]; n++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", n ? ", " : "", words[n]);
    return err_set(e, ERR_INPUT, "%s:%d: %s: found \"%.40s\", expected one of: %s", c->file, c->row[row].line, column,
                   c->row[row].cell[i], list);
}

void csv_note(const struct csv *c, const char *key, char *text, size_t room)
{
    const size_t n = strlen(key);
    size_t at = 0;
    text[0] = '\0';
    for (int i = 0; i < c->n_comments && at + 1 < room; i++)
        if (!strncmp(c->comment[i], key, n) && c->comment[i][n] == ':') {
            const char *from = c->comment[i] + n + 1;
            while (*from == ' ')
                from++;
            int w = snprintf(text + at, room - at, "%s%s", at ? " " : "", from);
            at += (size_t)w < room - at ? (size_t)w : room - at - 1;
        }
}
