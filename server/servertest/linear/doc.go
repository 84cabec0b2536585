// Package linear checks that what callers were told of workspaces and their
// secrets, and what containers were started with, is consistent with one order
// of all changes, over any number of crashes of the daemon. It is for tests,
// with whatever daemon they talk to: it knows its API and nothing else.
//
// A test makes a History, lets clients work on the daemon concurrently, and
// records what containers were started with; then it checks:
//
//	h := linear.NewHistory()
//	c := &linear.Client{API: api, History: h, ID: 0} // one a goroutine
//	c.Do(ctx, linear.Op{Kind: linear.Create, Workspace: "w", Image: image})
//	c.Do(ctx, linear.Op{Kind: linear.Set, Workspace: "w", Set: map[string]string{"K": "v1"}})
//	...
//	err := h.Check(linear.Options{Timeout: time.Minute})
//
// # What has to be recorded
//
// Everything that changes what the model knows: all changes of these workspaces,
// and all changes of global secrets while they are there; global secrets from
// before are no matter as long as their keys are not used. Other workspaces may
// not be affected by a change of global secrets. Spec, labels and model may not
// change after Create, no container may end for good by its crash policy, and no
// workspace may be deleted. What only looks may be left out. Values should be
// unique, so that a stale one shows.
//
// # Calls of which the outcome is unknown
//
// A call that ends without an answer (the daemon was killed, the caller went
// away) may have taken effect or not, and may do so later. History.Barrier says
// that none does any more: a test calls it when the daemon has ended, before the
// next one is started. Without a barrier the check is as right, but it tells
// less, and takes longer.
//
// # What containers saw
//
// A Launch is a look at all secrets and the generation at one moment: between
// the moment when its Call was begun, before which the container's values can't
// have been read, and its End, after which they can't have been read any more.
// Where the daemon reads late and the test sees the runtime, that is a narrow
// window, see sim; from outside it may be from the end of the container before
// to the moment when the new one said what it was started with. An interval that
// is too wide weakens the check, one that is too narrow makes it wrong.
package linear
