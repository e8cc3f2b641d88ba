#include "cpu_features.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace stylefast {
namespace {

// from the least to the most able
const char* const kSets[] = {"avx2", "avx512", "avx512_bf16"};

std::vector<std::string> find_features() {
    std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
    const auto bit = [](std::uint32_t word, int position) { return (word >> position & 1) != 0; };
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return found;  // the system manages vector state
    const bool avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
    std::uint32_t saved = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    const bool saves_256 = (saved & 0x6) == 0x6, saves_512 = (saved & 0xe6) == 0xe6;
    if (!avx || !saves_256 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    if (bit(b, 5)) found.push_back("avx2");
    if (fma) found.push_back("fma");
    if (f16c) found.push_back("f16c");
    if (saves_512 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31)) {  // F, DQ, BW, VL
        found.push_back("avx512");
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5)) found.push_back("avx512_bf16");
    }
#endif
    return found;
}

// of kSets, those that work here, each with all that its kernels take for granted
std::vector<std::string> usable_sets() {
    const std::vector<std::string> features = cpu_features();
    const auto has = [&](const char* name) {
        return std::find(features.begin(), features.end(), name) != features.end();
    };
    std::vector<std::string> usable;
    if (!has("avx2") || !has("fma") || !has("f16c")) return usable;
    for (const char* set : kSets) {
        if (has(set)) usable.push_back(set);
    }
    return usable;
}

}  // namespace

std::vector<std::string> cpu_features() {
    static const std::vector<std::string> found = find_features();
    return found;
}

std::string instruction_set() {
    static const std::vector<std::string> usable = usable_sets();
    const char* cap = std::getenv("STYLEFAST_CPU");
    if (cap == nullptr || *cap == '\0') return usable.empty() ? "" : usable.back();
    if (cap == std::string("none")) return "";
    if (std::find(usable.begin(), usable.end(), cap) != usable.end()) return cap;
    std::string there = "none";
    for (const std::string& set : usable) there += ", " + set;
    throw std::invalid_argument(std::string("STYLEFAST_CPU is '") + cap + "', but the sets usable here are: " + there);
}

}  // namespace stylefast
