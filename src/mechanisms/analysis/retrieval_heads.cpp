#include "mechanisms/entries.h"

namespace heed::mechanisms {

// What computes it needs a session and lies above this floor (lab/retrieval_heads.h); the catalogue names it.
Entry retrieval_heads() {
  Entry e;
  e.name = "retrieval-heads", e.title = "Retrieval Head Mechanistically Explains Long-Context Factuality";
  e.paper = "Wu et al., 2024, arXiv 2404.15574", e.year = 2024, e.kind = "analysis";
  e.equation = "score(head) = |needle tokens said while the head's arg-max lay on them| / |needle tokens|";
  e.needs = "prompts with a needle: heed heads";
  e.no_identity = "it measures and changes nothing";
  e.verified = {"formula"};
  return e;
}

}  // namespace heed::mechanisms
