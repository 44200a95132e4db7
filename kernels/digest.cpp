// The list of digests.
#include "digest.h"

namespace shoal {

std::vector<OpDigest> compute_digests() {
  std::vector<OpDigest> digests;
  digest_matrices(digests);
  digest_floats(digests);
  digest_attention(digests);
  digest_sampling(digests);
  return digests;
}

}  // namespace shoal
