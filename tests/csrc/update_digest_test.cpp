// The bits of updates over random states, as this architecture and every other must have them.
//
// The digests below were written on x86-64. One that changes means that training from a checkpoint would go
// on with other bits than before.
#include "check.h"
#include "updated_states.h"

namespace offload {
namespace {

using namespace test;

// FNV-1a.
class Digest {
 public:
  void add(const Array& array) {
    for (size_t i = 0; i < array.bytes(); ++i) {
      value_ = (value_ ^ array.as<unsigned char>()[i]) * 0x100000001b3u;
    }
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

struct Expected {
  UpdateScalars scalars;
  uint64_t digests[3];  // by format of the moments
};

const Expected kExpected[] = {
    {kScalars, {0x203dba3765680e1b, 0xc7c66429680901ff, 0x7171d1d0f10bd151}},
    {kLion, {0x7d76cc09fc37ac7a, 0x68b64707a523f24, 0x65c82a8e704696ca}},
    {kAdagrad, {0x70092e424f9e84bb, 0xe0ce211c3342d240, 0x727e69ee45ec096}},
};

// Of two steps in every layout with these moments. All stays finite: what makes a NaN decides its sign.
uint64_t digest_of(const UpdateScalars& scalars, MomentFormat moments, Isa isa) {
  // The second has denormals, and products that are.
  const Values families[] = {Values(), Values(0, 148)};
  Digest digest;
  for (const Layout& layout : all_layouts()) {
    if (layout.moments != moments) continue;
    for (const Values& values : families) {
      for (bool flush_denormals : {false, true}) {
        States states(layout, 1'000, 0, values);  // whole blocks and a tail
        for (size_t step = 0; step < 2; ++step) {
          update_states(states.span_for(scalars), scalars, kFactors, 4, flush_denormals, isa);
        }
        for (const Array* array : states.arrays()) digest.add(*array);
      }
    }
  }
  return digest.value();
}

void digests_are_those_of_every_other_architecture() {
  for (const Expected& expected : kExpected) {
    for (MomentFormat moments : kAllMoments) {
      for (Isa isa : kAllIsas) {
        if (!isa_available(isa)) continue;
        CHECK_EQ(digest_of(expected.scalars, moments, isa), expected.digests[static_cast<size_t>(moments)]);
      }
    }
  }
}

}  // namespace
}  // namespace offload

int main() {
  offload::digests_are_those_of_every_other_architecture();
  return offload::test::result();
}
