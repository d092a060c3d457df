/* SPDX-License-Identifier: Apache-2.0
 * test_sha256.c - the vectors of FIPS 180-4 (NIST's example values), in one piece and in many. */
#include "config.h"

#include "sha256.h"
#include "trace_fixture.h"

static const struct {
    const char *text;
    size_t times;
    const char *hex;
} vector[] = {
    { "", 1, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" },
    { "abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" },
    { "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
      "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1" },
    { "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmn"
      "hijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
      1, "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1" },
    { "a", 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0" },
};

static void vectors(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof vector / sizeof *vector; i++) {
        struct sha256 s;
        char hex[65];
        sha256_init(&s);
        for (size_t j = 0; j < vector[i].times; j++)
            sha256_update(&s, vector[i].text, strlen(vector[i].text));
        sha256_final(&s, hex);
        assert_string_equal(hex, vector[i].hex);
    }
}

/* Every split of every length around the block's and the padding's borders. */
static void pieces(void **state)
{
    unsigned char data[200];
    (void)state;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)(i * 37);
    for (size_t n = 0; n < sizeof data; n++)
        for (size_t cut = 0; cut <= n; cut += 7) {
            struct sha256 s;
            char whole[65], parts[65];
            sha256_init(&s);
            sha256_update(&s, data, n);
            sha256_final(&s, whole);
            sha256_init(&s);
            sha256_update(&s, data, cut);
            sha256_update(&s, data + cut, n - cut);
            sha256_final(&s, parts);
            assert_string_equal(whole, parts);
        }
}

static void files(void **state)
{
    struct err err = { 0 };
    char hex[65];
    write_text(scratch_path(*state, "abc"), "abc");
    assert_int_equal(sha256_file(scratch_path(*state, "abc"), hex, &err), 0);
    assert_string_equal(hex, vector[1].hex);
    assert_says(&err, sha256_file(scratch_path(*state, "none"), hex, &err), "none", "No such file", NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(vectors),
        cmocka_unit_test(pieces),
        cmocka_unit_test_setup_teardown(files, scratch_make, scratch_remove),
    };
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return cmocka_run_group_tests_name("sha256", tests, NULL, NULL);
}
