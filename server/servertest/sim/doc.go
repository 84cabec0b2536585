// Package sim runs workspaced through thousands of random worlds. Each has the
// real server over gRPC, the real store on a file, the real actors, a runtime in
// memory, clients who retry, give up, wait and watch, and everything that can go
// wrong: steps that fail, hang and panic, kills and shutdowns of the daemon, ends
// of containers, a clock that jumps, containers of strangers. After it all must be
// as if nothing had gone wrong.
//
// # What is checked
//
// At every answer: that it may be given. A generation never goes back, and each
// change has one of its own; changed says whether anything differed; what is
// shown was written and not overwritten; a wait that succeeds tells the truth; no
// error has a code that is not documented, or a secret's value in it.
//
// At every start of a container: that it has what was acknowledged before its
// values were read, and nothing that never was; that nothing was stopped without
// need.
//
// At every boot: that everything is on disk that was ever acknowledged.
//
// At the end, when all faults have ended and 20 minutes have passed: that every
// workspace that is meant to run has exactly one container, with exactly its
// record's environment, the others none, and nothing else is left; that every
// watcher, over whatever resumptions, has the same picture as a list gives; that
// all panics were counted, no secret is in the log, no goroutine is left.
//
// RunLinear checks less, and that completely: that there is one order of all
// changes of secrets and generations that explains everything that anybody was
// told; see package linear.
//
// # Seeds
//
// Everything that is drawn comes from the seed, and is drawn before it happens or
// from a name that belongs to the thing, so that a seed is the same workload, the
// same faults and the same delays each time. Time is the bubble's, so that nothing
// happens at the same time as another thing unless both were drawn so. What does,
// is ordered by the Go scheduler, which draws from no seed of ours: with one
// processor, which all but every fourth seed has, it nearly always comes out the
// same, and not always. A failure that does not come again at once comes again
// within some tries.
package sim
