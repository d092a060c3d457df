/* SPDX-License-Identifier: Apache-2.0
 *
 * npy.c - reading and writing NumPy's .npy files; npy_values.c reads and checks what is in them.
 *
 * A file is magic, version, header length, a Python dict literal and the array. The dict is parsed by hand and
 * strictly: three keys, each once. Data are mapped, never copied, unless an unusual header leaves them unaligned.
 *
 * Safe against SIGBUS: the file's size is compared with what the header promises before anything is read through the
 * map. (A file that another process shortens while it is mapped is beyond what any check here could see.)
 */
#include "config.h"

#include "npy.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define NATIVE_ORDER '>'
#define NATIVE_WORD  "big"
#else
#define NATIVE_ORDER '<'
#define NATIVE_WORD  "little"
#endif

/* ---- the header's dict ---- */

struct cursor {
    const char *path, *begin, *at, *end;
    struct err *err;
};

static void skip_space(struct cursor *c)
{
    while (c->at < c->end && (*c->at == ' ' || *c->at == '\t' || *c->at == '\n' || *c->at == '\r'))
        c->at++;
}

static int header_error(const struct cursor *c, const char *expected)
{
    char found[20];
    size_t n = 0;
    while (c->at + n < c->end && n < sizeof found - 1) {
        found[n] = isprint((unsigned char)c->at[n]) ? c->at[n] : '?';
        n++;
    }
    found[n] = '\0';
    if (n == 0)
        return err_set(c->err, ERR_INPUT, "%s: header ends at its byte %td, expected %s", c->path, c->at - c->begin,
                       expected);
    return err_set(c->err, ERR_INPUT, "%s: header, byte %td: found \"%s\", expected %s", c->path, c->at - c->begin,
                   found, expected);
}

static bool accept(struct cursor *c, const char *token)
{
    skip_space(c);
    size_t n = strlen(token);
    if ((size_t)(c->end - c->at) < n || memcmp(c->at, token, n) != 0)
        return false;
    c->at += n;
    return true;
}

/* 'text' or "text"; no escapes: no legal header has them. */
static int read_string(struct cursor *c, char *out, size_t room, const char *expected)
{
    skip_space(c);
    if (c->at == c->end || (*c->at != '\'' && *c->at != '"'))
        return header_error(c, expected);
    const char *text = c->at + 1;
    const char *close = memchr(text, *c->at, (size_t)(c->end - text));
    if (!close || (size_t)(close - text) >= room)
        return header_error(c, expected);
    memcpy(out, text, (size_t)(close - text));
    out[close - text] = '\0';
    c->at = close + 1;
    return 0;
}

/* Kind and size from a descr such as "<f4". */
static int parse_descr(struct npy *a, const char *descr, struct err *err)
{
    static const char expected[] = "one of u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8 b1";
    const char *p = descr;
    char order = '|';
    if (*p == '<' || *p == '>' || *p == '|' || *p == '=')
        order = *p++;
    char kind = *p;
    int bytes = kind && p[1] >= '1' && p[1] <= '8' && p[2] == '\0' ? p[1] - '0' : 0;
    bool power = bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8;
    bool known = power && (((kind == 'u' || kind == 'i')) || (kind == 'f' && bytes > 1) || (kind == 'b' && bytes == 1));
    if (!known)
        return err_set(err, ERR_INPUT, "%s: dtype is \"%s\", expected %s", a->path, descr, expected);
    if (bytes > 1 && order != NATIVE_ORDER && order != '=')
        return err_set(err, ERR_INPUT, "%s: dtype \"%s\" is not %s endian; convert with a.astype(\"%c%c%d\")", a->path,
                       descr, NATIVE_WORD, NATIVE_ORDER, kind, bytes);
    a->kind = kind;
    a->item_bytes = bytes;
    return 0;
}

static int parse_shape(struct npy *a, struct cursor *c)
{
    if (!accept(c, "("))
        return header_error(c, "a shape such as (3, 4)");
    a->n_dims = 0;
    while (!accept(c, ")")) {
        if (a->n_dims > 0 && !accept(c, ","))
            return header_error(c, "',' or ')' in the shape");
        if (a->n_dims > 0 && accept(c, ")"))
            break;
        skip_space(c);
        if (c->at == c->end || !isdigit((unsigned char)*c->at))
            return header_error(c, "a size (0 or more) in the shape");
        if (a->n_dims == NPY_MAX_DIMS)
            return err_set(c->err, ERR_INPUT, "%s: more than %d dimensions", a->path, NPY_MAX_DIMS);
        int64_t size = 0;
        while (c->at < c->end && isdigit((unsigned char)*c->at)) {
            if (__builtin_mul_overflow(size, 10, &size) || __builtin_add_overflow(size, *c->at - '0', &size))
                return err_set(c->err, ERR_INPUT, "%s: dimension %d of the shape is beyond 2^63", a->path, a->n_dims);
            c->at++;
        }
        accept(c, "L"); /* Python 2 wrote long integers so */
        a->shape[a->n_dims++] = size;
    }
    return 0;
}

static int parse_dict(struct npy *a, struct cursor *c)
{
    enum { DESCR = 1, ORDER = 2, SHAPE = 4 };
    int seen = 0, rc;
    char text[32];
    if (!accept(c, "{"))
        return header_error(c, "'{'");
    while (!accept(c, "}")) {
        if (seen && !accept(c, ","))
            return header_error(c, "',' or '}'");
        if (seen && accept(c, "}"))
            break;
        const char *key_at = c->at;
        if ((rc = read_string(c, text, sizeof text, "a key: 'descr', 'fortran_order' or 'shape'")) < 0)
            return rc;
        int key = !strcmp(text, "descr")           ? DESCR
                  : !strcmp(text, "fortran_order") ? ORDER
                  : !strcmp(text, "shape")         ? SHAPE
                                                   : 0;
        if (!key || (seen & key)) {
            c->at = key_at;
            return header_error(c, "each of 'descr', 'fortran_order' and 'shape' once");
        }
        seen |= key;
        if (!accept(c, ":"))
            return header_error(c, "':'");
        skip_space(c);
        if (key == SHAPE) {
            if ((rc = parse_shape(a, c)) < 0)
                return rc;
        } else if (key == ORDER) {
            if (accept(c, "True"))
                return err_set(c->err, ERR_INPUT,
                               "%s: Fortran order, expected C order; convert with "
                               "numpy.ascontiguousarray(a)",
                               a->path);
            if (!accept(c, "False"))
                return header_error(c, "True or False");
        } else {
            if (c->at < c->end && *c->at == '[')
                return err_set(c->err, ERR_INPUT, "%s: structured dtype, expected plain numbers", a->path);
            if ((rc = read_string(c, text, sizeof text, "a dtype such as '<f4'")) < 0 ||
                (rc = parse_descr(a, text, c->err)) < 0)
                return rc;
        }
    }
    skip_space(c);
    if (seen != (DESCR | ORDER | SHAPE))
        return err_set(c->err, ERR_INPUT, "%s: header has no key '%s'", a->path,
                       !(seen & DESCR)   ? "descr"
                       : !(seen & ORDER) ? "fortran_order"
                                         : "shape");
    return c->at == c->end ? 0 : header_error(c, "the end of the header");
}

/* ---- opening ---- */

static void shape_text(int n_dims, const int64_t *shape, char *text, size_t room)
{
    size_t n = (size_t)snprintf(text, room, "(");
    for (int d = 0; d < n_dims && n < room; d++) {
        n += (size_t)snprintf(text + n, room - n, "%s", d ? ", " : "");
        if (n < room)
            n += shape[d] < 0 ? (size_t)snprintf(text + n, room - n, "any")
                              : (size_t)snprintf(text + n, room - n, "%" PRId64, shape[d]);
    }
    if (n < room)
        snprintf(text + n, room - n, n_dims == 1 ? ",)" : ")");
}

/* Sets count; *bytes: what the data take. Overflow is checked over the non-zero sizes, so that the strides of an
 * empty array fit too. */
static int count_items(struct npy *a, size_t *bytes, struct err *err)
{
    int64_t product = 1, total;
    a->count = 1;
    for (int d = 0; d < a->n_dims; d++) {
        if (a->shape[d] == 0)
            a->count = 0;
        else if (__builtin_mul_overflow(product, a->shape[d], &product))
            goto overflow;
    }
    if (__builtin_mul_overflow(product, a->item_bytes, &total) || (uint64_t)total > SIZE_MAX / 2)
        goto overflow;
    if (a->count)
        a->count = product;
    *bytes = a->count ? (size_t)total : 0;
    return 0;
overflow:;
    char text[96];
    shape_text(a->n_dims, a->shape, text, sizeof text);
    return err_set(err, ERR_INPUT, "%s: shape %s of %d-byte items overflows the address space", a->path, text,
                   a->item_bytes);
}

/* Checks everything the mapped bytes say; sets *offset to where the data begin. */
static int parse_file(struct npy *a, size_t *offset, struct err *err)
{
    const unsigned char *b = a->map;
    if (a->map_bytes < 10 || memcmp(b, "\x93NUMPY", 6) != 0)
        return err_set(err, ERR_INPUT, "%s: not a .npy file (%s)", a->path,
                       a->map_bytes < 10 ? "shorter than the 10 bytes every one begins with"
                                         : "it does not begin with \\x93NUMPY");
    unsigned version = b[6];
    if (version < 1 || version > 3)
        return err_set(err, ERR_INPUT, "%s: .npy version %u.%u, expected 1, 2 or 3", a->path, version, b[7]);
    size_t prefix = version == 1 ? 10 : 12;
    if (a->map_bytes < prefix)
        return err_set(err, ERR_INPUT, "%s: truncated: %zu bytes, the header alone needs more", a->path, a->map_bytes);
    size_t length = b[8] | (size_t)b[9] << 8;
    if (version > 1)
        length |= (size_t)b[10] << 16 | (size_t)b[11] << 24;
    if (length > a->map_bytes - prefix)
        return err_set(err, ERR_INPUT, "%s: truncated: the header takes %zu bytes, the file has %zu after byte %zu",
                       a->path, length, a->map_bytes - prefix, prefix);

    const char *text = (const char *)b + prefix;
    struct cursor c = { a->path, text, text, text + length, err };
    size_t bytes;
    int rc = parse_dict(a, &c);
    if (rc == 0)
        rc = count_items(a, &bytes, err);
    if (rc < 0)
        return rc;
    size_t found = a->map_bytes - prefix - length;
    if (found != bytes) {
        char shape[96];
        shape_text(a->n_dims, a->shape, shape, sizeof shape);
        return err_set(err, ERR_INPUT, "%s: %s: %zu bytes of data, expected %zu for shape %s of %c%d", a->path,
                       found < bytes ? "truncated" : "trailing bytes", found, bytes, shape, a->kind, a->item_bytes);
    }
    *offset = prefix + length;
    return 0;
}

/* Data that begin at an odd offset (legal, but no common writer does it) move to memory of their own. */
static int align_data(struct npy *a, size_t offset, struct err *err)
{
    size_t bytes = a->map_bytes - offset;
    void *copy = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED)
        return err_set(err, ERR_MEMORY, "%s: no memory for %zu bytes", a->path, bytes);
    memcpy(copy, (const char *)a->map + offset, bytes);
    munmap(a->map, a->map_bytes);
    a->map = copy;
    a->map_bytes = bytes;
    a->data = copy;
    return 0;
}

/* What comes through standard input, in a file that can be mapped, as often as it is opened: a pipe runs dry once. */
static int open_standard_input(struct err *err)
{
    static FILE *copy;
    char buffer[1 << 16];
    if (!copy) {
        if (!(copy = tmpfile()))
            return err_set(err, ERR_IO, "standard input: cannot make a temporary file: %s", strerror(errno));
        for (size_t n; (n = fread(buffer, 1, sizeof buffer, stdin)) > 0;)
            if (fwrite(buffer, 1, n, copy) < n)
                return err_set(err, ERR_IO, "standard input: cannot keep it in a temporary file: %s", strerror(errno));
        if (ferror(stdin) || fflush(copy) != 0)
            return err_set(err, ERR_IO, "standard input: %s", strerror(errno));
    }
    int fd = fcntl(fileno(copy), F_DUPFD_CLOEXEC, 0);
    return fd < 0 ? err_set(err, ERR_IO, "standard input: %s", strerror(errno)) : fd;
}

int npy_open(struct npy *a, const char *path, struct err *err)
{
    const bool piped = !strcmp(path, "-");
    struct stat st;
    size_t offset = 0;
    int rc = 0, fd = -1;
    memset(a, 0, sizeof *a);
    if (strlen(path) >= sizeof a->path)
        return err_set(err, ERR_INPUT, "%s: path of %zu bytes, expected fewer than %zu", path, strlen(path),
                       sizeof a->path);
    path = piped ? "standard input" : path;
    memcpy(a->path, path, strlen(path) + 1);
    /* O_NONBLOCK: a FIFO given by mistake must be refused, not waited for. */
    fd = piped ? open_standard_input(err) : open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (piped && fd < 0)
        return err->code;
    if (fd < 0 || fstat(fd, &st) < 0) {
        rc = err_set(err, ERR_INPUT, "%s: %s", path, strerror(errno));
        goto out;
    }
    if (!S_ISREG(st.st_mode)) {
        rc = err_set(err, ERR_INPUT, "%s: not a regular file, expected a .npy file", path);
        goto out;
    }
    if (st.st_size == 0) {
        rc = err_set(err, ERR_INPUT, "%s: empty file, expected a .npy file", path);
        goto out;
    }
    a->map_bytes = (size_t)st.st_size;
    a->map = mmap(NULL, a->map_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    if (a->map == MAP_FAILED) {
        a->map = NULL;
        rc = err_set(err, ERR_IO, "%s: cannot map %zu bytes: %s", path, a->map_bytes, strerror(errno));
        goto out;
    }
    if ((rc = parse_file(a, &offset, err)) < 0)
        goto out;
    a->data = (const char *)a->map + offset;
    if (a->count > 0 && offset % (size_t)a->item_bytes)
        rc = align_data(a, offset, err);
out:
    if (fd >= 0)
        close(fd);
    if (rc < 0)
        npy_close(a);
    return rc;
}

void npy_close(struct npy *a)
{
    if (a->map)
        munmap(a->map, a->map_bytes);
    a->map = NULL;
    a->data = NULL;
    a->map_bytes = 0;
    a->count = 0;
}

/* ---- checks ---- */

int npy_expect(const struct npy *a, const char *dtypes, int n_dims, const int64_t *shape, struct err *err)
{
    bool fits = false;
    for (const char *p = dtypes; *p; p += *p == '|')
        for (fits |= p[0] == a->kind && p[1] - '0' == a->item_bytes; *p && *p != '|';)
            p++;
    if (!fits)
        return err_set(err, ERR_INPUT, "%s: dtype is %c%d, expected %s", a->path, a->kind, a->item_bytes, dtypes);
    fits = n_dims == a->n_dims;
    for (int d = 0; d < n_dims && fits; d++)
        fits = shape[d] < 0 || shape[d] == a->shape[d];
    if (fits)
        return 0;
    char found[96], expected[96];
    shape_text(a->n_dims, a->shape, found, sizeof found);
    shape_text(n_dims, shape, expected, sizeof expected);
    return err_set(err, ERR_INPUT, "%s: shape is %s, expected %s", a->path, found, expected);
}

/* ---- writing ---- */

static int write_error(struct npy_writer *w, struct err *err)
{
    int rc = err_set(err, ERR_IO, "%s: cannot write: %s", w->part, strerror(errno));
    npy_abandon(w);
    return rc;
}

int npy_create(struct npy_writer *w, const char *path, const char *dtype, int n_dims, const int64_t *shape,
               struct err *err)
{
    struct npy a = { .n_dims = n_dims };
    char header[192], dims[96], descr[8];
    size_t bytes;
    int rc;
    memset(w, 0, sizeof *w);
    if (strlen(path) >= sizeof w->path)
        return err_set(err, ERR_INPUT, "%s: path of %zu bytes, expected fewer than %zu", path, strlen(path),
                       sizeof w->path);
    memcpy(w->path, path, strlen(path) + 1);
    memcpy(a.path, path, strlen(path) + 1);
    snprintf(w->part, sizeof w->part, "%s.part", path);
    if (n_dims < 0 || n_dims > NPY_MAX_DIMS)
        return err_set(err, ERR_INPUT, "%s: %d dimensions, expected 0 to %d", path, n_dims, NPY_MAX_DIMS);
    for (int d = 0; d < n_dims; d++)
        if ((a.shape[d] = shape[d]) < 0)
            return err_set(err, ERR_INPUT, "%s: dimension %d is %" PRId64 ", expected 0 or more", path, d, shape[d]);
    snprintf(descr, sizeof descr, "%c%.6s", NATIVE_ORDER, dtype);
    if ((rc = parse_descr(&a, descr, err)) < 0 || (rc = count_items(&a, &bytes, err)) < 0)
        return rc;
    if (a.item_bytes == 1)
        descr[0] = '|';
    shape_text(n_dims, shape, dims, sizeof dims);

    /* Version 1: ten bytes, then the dict padded so that the data begin at a multiple of 64. */
    int n = snprintf(header + 10, sizeof header - 10, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }", descr,
                     dims);
    size_t length = ((size_t)n + 11 + 63) / 64 * 64;
    memset(header + 10 + n, ' ', length - 10 - (size_t)n);
    header[length - 1] = '\n';
    memcpy(header, "\x93NUMPY\x01\x00", 8);
    header[8] = (char)((length - 10) & 0xff);
    header[9] = (char)((length - 10) >> 8);

    w->left = (int64_t)bytes;
    w->file = fopen(w->part, "wbe");
    if (!w->file)
        return err_set(err, ERR_IO, "%s: cannot create: %s", w->part, strerror(errno));
    return fwrite(header, 1, length, w->file) == length ? 0 : write_error(w, err);
}

int npy_append(struct npy_writer *w, const void *data, size_t bytes, struct err *err)
{
    if (!w->file || bytes > (uint64_t)w->left) {
        npy_abandon(w);
        return err_set(err, ERR_INPUT, "%s: more data than its shape holds", w->path);
    }
    w->left -= (int64_t)bytes;
    return bytes == 0 || fwrite(data, 1, bytes, w->file) == bytes ? 0 : write_error(w, err);
}

int npy_finish(struct npy_writer *w, struct err *err)
{
    if (!w->file || w->left) {
        npy_abandon(w);
        return err_set(err, ERR_INPUT, "%s: less data than its shape holds", w->path);
    }
    /* A full disk may show only when the last buffer is flushed or the file is closed. */
    bool failed = fflush(w->file) != 0 || ferror(w->file);
    if (!failed) {
        failed = fclose(w->file) != 0;
        w->file = NULL;
    }
    if (failed || rename(w->part, w->path) < 0) {
        int rc = err_set(err, ERR_IO, "%s: cannot write: %s", w->path, strerror(errno));
        if (!w->file)
            unlink(w->part);
        npy_abandon(w);
        return rc;
    }
    return 0;
}

void npy_abandon(struct npy_writer *w)
{
    if (w->file) {
        fclose(w->file);
        unlink(w->part);
    }
    w->file = NULL;
}

int npy_write(const char *path, const char *dtype, int n_dims, const int64_t *shape, const void *data, struct err *err)
{
    struct npy_writer w;
    int rc = npy_create(&w, path, dtype, n_dims, shape, err);
    if (rc == 0)
        rc = npy_append(&w, data, (size_t)w.left, err);
    return rc == 0 ? npy_finish(&w, err) : rc;
}
