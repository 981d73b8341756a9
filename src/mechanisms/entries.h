// One function for each entry of the catalogue; each is defined in the file named after it.
#pragma once
#include "attention/spec.h"

namespace heed::mechanisms {

Entry dense();
Entry a2sf();
Entry a_shape();
Entry act();
Entry adakv();
Entry cake();
Entry caote();
Entry capkv();
Entry chunk_local();
Entry chunkkv();
Entry compactor();
Entry criticalkv();
Entry cur();
Entry defensivekv();
Entry dms();
Entry duo_attention();
Entry expected_attention();
Entry finch();
Entry flexprefill();
Entry gdn();
Entry gna();
Entry h2o();
Entry headkv();
Entry keydiff();
Entry kivi();
Entry knorm();
Entry kvzip();
Entry lagkv();
Entry leverage();
Entry moa();
Entry moba();
Entry noncausal();
Entry observed_attention();
Entry omnikv();
Entry power();
Entry pyramidkv();
Entry quest();
Entry r_kv();
Entry random();
Entry recycled_attention();
Entry rerotate();
Entry retrieval_heads();
Entry ring();
Entry simlayerkv();
Entry snapkv();
Entry spatten();
Entry star();
Entry stochastic_sa();
Entry streaming_llm();
Entry tidal_decode();
Entry tova();
Entry tri_shape();
Entry triangle_mix();
Entry twilight();
Entry xattention();
Entry zipvl();

}  // namespace heed::mechanisms
