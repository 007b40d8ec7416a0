// A self test that fails: proof that a failing check turns the program's status red.
#include "emulator/selftests/selftest.h"

TEST(one_is_two) { CHECK(1 == 2); }
