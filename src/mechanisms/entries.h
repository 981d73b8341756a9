// One function for each entry of the catalogue; each is defined in the file named after it.
#pragma once
#include "attention/spec.h"

namespace heed::mechanisms {

Entry dense();
Entry act();
Entry adakv();
Entry flexprefill();
Entry gdn();
Entry h2o();
Entry kivi();
Entry knorm();
Entry kvzip();
Entry moba();
Entry pyramidkv();
Entry quest();
Entry retrieval_heads();
Entry ring();
Entry snapkv();
Entry streaming_llm();
Entry tidal_decode();
Entry tova();
Entry xattention();

}  // namespace heed::mechanisms
