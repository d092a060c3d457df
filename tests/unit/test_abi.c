/* SPDX-License-Identifier: Apache-2.0
 * test_abi.c - a change of what policies compile against needs a new number.
 *
 * tests/golden/abi.sum holds MOE_ABI and the SHA-256 of core/moelab.h without comments, all white space as one blank.
 * After an intended change: raise MOE_ABI in core/moelab.h (a change of meaning needs that too, though no test sees it;
 * before the first release a number may be kept) and run `top_srcdir=. tests/unit/test_abi --update`. */
#include "core_test.h"

#include "sha256.h"

#include <ctype.h>

static char *header(void)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/core/moelab.h", test_env("top_srcdir", "."));
    FILE *f = fopen(path, "r");
    if (!f)
        return NULL;
    size_t n = 0, room = 1 << 20;
    char *text = calloc(room, 1);
    if (text)
        n = fread(text, 1, room - 1, f);
    fclose(f);
    if (n == 0) {
        free(text);
        return NULL;
    }
    return text;
}

/* In place: comments and runs of white space become one blank; strings stay. */
static void strip(char *text)
{
    char *to = text;
    bool quoted = false, blank = true;
    for (const char *c = text; *c; c++) {
        if (!quoted && c[0] == '/' && c[1] == '*') {
            const char *end = strstr(c + 2, "*/");
            c = end ? end + 1 : c + strlen(c) - 1;
        } else if (quoted || !isspace((unsigned char)*c)) {
            quoted ^= *c == '"' && c[-1] != '\\';
            *to++ = *c;
            blank = false;
            continue;
        }
        if (!blank)
            *to++ = ' ';
        blank = true;
    }
    *to = '\0';
}

static void sum(char line[80])
{
    struct sha256 h;
    char hex[65];
    char *text = header();
    if (!text)
        fail_msg("core/moelab.h cannot be read; is top_srcdir set?");
    strip(text);
    sha256_init(&h);
    sha256_update(&h, text, strlen(text));
    sha256_final(&h, hex);
    free(text);
    snprintf(line, 80, "%u %s\n", MOE_ABI, hex);
}

static void sum_path(char path[4096])
{
    snprintf(path, 4096, "%s/tests/golden/abi.sum", test_env("top_srcdir", "."));
}

static void header_has_its_number(void **state)
{
    (void)state;
    char now[80], kept[80] = "", path[4096];
    sum(now);
    sum_path(path);
    FILE *f = fopen(path, "r");
    if (!f || !fgets(kept, sizeof kept, f))
        fail_msg("%s: cannot be read", path);
    fclose(f);
    if (strcmp(now, kept))
        fail_msg("core/moelab.h is not what %s was made from (ABI %.*s, now %u): bump MOE_ABI if policies built "
                 "before would break, then run: top_srcdir=. tests/unit/test_abi --update", path,
                 (int)strcspn(kept, " "), kept, MOE_ABI);
}

static void comments_and_blanks_do_not_count(void **state)
{
    (void)state;
    char a[] = "int x; /* a * / comment */\n\n#define S \"/* kept */\"\nint  y;";
    char b[] = "int x;\n#define S \"/* kept */\" int y;";
    strip(a);
    strip(b);
    assert_string_equal(a, "int x; #define S \"/* kept */\" int y;");
    assert_string_equal(a, b);
}

/* What every plugin relies on before anything else is known. */
static void first_fields_never_move(void **state)
{
    (void)state;
    assert_int_equal(offsetof(struct moe_plugin, abi), 0);
    assert_int_equal(offsetof(struct moe_plugin, size), 4);
    assert_int_equal(offsetof(struct moe_plugin, kind), 8);
    assert_int_equal(offsetof(struct moe_host, abi), 0);
    assert_int_equal(offsetof(struct moe_host, size), 4);
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "--update")) {
        char line[80], path[4096];
        sum(line);
        sum_path(path);
        FILE *f = fopen(path, "w");
        return f && fputs(line, f) >= 0 && fclose(f) == 0 ? 0 : 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(header_has_its_number),
        cmocka_unit_test(comments_and_blanks_do_not_count),
        cmocka_unit_test(first_fields_never_move),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
