package sim

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/store"
)

const envToken = "WORKSPACE_TOKEN"

// hasAPI reports whether a workspace's containers have tokens of their own.
func hasAPI(ws string) bool { return strings.ContainsAny(ws[len(ws)-1:], "02468") }

// fromContainer reports whether a container makes the call.
func (o *op) fromContainer() bool { return o.kind == opBeat || o.kind == opFetch }

// container is what a call that a container makes is made with.
type container struct {
	instance, token string
	// of is what the call is about: its own workspace, or another one.
	of string
	// current and ended say that it was the one on record as it called, or that
	// another one was.
	current, ended bool
}

// chooseContainer takes the part of the workspace's newest container, or of one that
// was before it.
func (c *client) chooseContainer(o *op) (who container) {
	d := roll(c.plan.seed, o.client<<16|o.n, "container")
	who.of = o.ws
	launches := c.fake.Launches(c.uidOf(o.ws))
	if len(launches) == 0 {
		return who
	}
	launch := launches[len(launches)-1]
	if d.chance(4) {
		launch = pick(d, launches...)
	}
	if len(c.plan.stable) > 1 && d.chance(8) {
		who.of = pick(d, slices.DeleteFunc(slices.Clone(c.plan.stable), func(id string) bool { return id == o.ws })...)
	}
	who.instance, who.token = launch.Instance.ID, envOf(launch.Env)[envToken]
	if st, ok := c.onRecord(o.ws); ok && st.Running != nil {
		who.current = st.Running.InstanceID == who.instance
		who.ended = !who.current && (st.Token == nil || st.Token.InstanceID != who.instance)
	}
	return who
}

// onRecord is the status on disk, while a daemon runs.
func (s *scene) onRecord(ws string) (store.Status, bool) {
	d := s.current()
	if d == nil {
		return store.Status{}, false
	}
	w, err := d.Store.Workspace(ws)
	return w.Status, err == nil
}

// callAsContainer makes the RPC of an operation that a container does.
func (c *client) callAsContainer(ctx context.Context, a *attempt) (ans answer, err error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+a.container.token)
	name := "workspaces/" + a.container.of
	if a.kind == opBeat {
		r, err := c.containers.Heartbeat(ctx, &workspacev1.HeartbeatRequest{Name: name})
		return answer{message: r, generation: r.GetGeneration()}, err
	}
	r, err := c.containers.FetchSecrets(ctx, &workspacev1.FetchSecretsRequest{Name: name})
	return answer{message: r, generation: r.GetGeneration(), fetched: r.GetSecrets()}, err
}

// checkContainer checks what a container was answered: it is the workspace's, and its
// values are what may be.
func (c *client) checkContainer(a *attempt, ans answer) {
	switch who := a.container; {
	case who.token == "":
		c.problem("%s: done without a token", a.op)
	case who.of != a.ws:
		c.problem("%s: done for %s", a.op, who.of)
	case who.ended:
		c.problem("%s: done for %s, which had ended", a.op, who.instance)
	}
	name := generationCounter(c.uidOf(a.ws))
	if err := c.ledger.told(name, ans.generation, a.floors[name], false); err != nil {
		c.problem("%s: %v", a.op, err)
	}
	if a.kind != opFetch {
		return
	}
	got := make(map[string]string)
	for _, s := range ans.fetched {
		got[s.GetKey()] = string(s.GetValue())
		if s.GetScope() == workspacev1.SecretScope_SECRET_SCOPE_WORKSPACE {
			name := versionCounter(a.ws, s.GetKey())
			if err := c.ledger.told(name, s.GetVersion(), a.floors[name], false); err != nil {
				c.problem("%s: %v", a.op, err)
			}
		}
	}
	call := runtimetest.Call{Method: opFetch, WorkspaceID: a.ws, InstanceID: a.container.instance}
	for _, key := range allKeys {
		if key == keyModel && c.ledger.mayBe(fieldRegister(a.ws, fieldModelEnv), keyModel, a.begin, a.end, nil) {
			continue // it may carry the model
		}
		c.checkSecret(call, key, got[key], window{moment{at: a.begin}, a.end})
	}
}

// mayRefuse reports whether a container may be refused like that.
func (c *client) mayRefuse(a *attempt, code codes.Code, reason string) bool {
	commits := a.kind == opFetch && c.faults.struck(store.Steps[0])
	switch code {
	case codes.Unauthenticated:
		st, ok := c.onRecord(a.ws)
		return a.container.token == "" || !a.container.current ||
			!ok || st.Running == nil || st.Running.InstanceID != a.container.instance
	case codes.PermissionDenied:
		return a.container.of != a.ws
	case codes.Unavailable:
		return reason == server.ReasonNotOnRecord && !a.container.current
	case codes.ResourceExhausted:
		return a.kind == opFetch && reason == server.ReasonTooManyFetches || commits && reason == server.ReasonDiskFull
	case codes.Internal:
		return commits
	case codes.FailedPrecondition:
		return a.kind == opFetch && reason == server.ReasonWorkspaceStopped &&
			c.ledger.mayBe(fieldRegister(a.ws, fieldParked), "true", a.begin, c.tick(), nil)
	}
	return false
}
