package sim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server"
)

// client does its operations one after another, and checks each answer.
type client struct {
	*scene
	id   int
	api  workspacev1.WorkspaceControlClient
	told map[string]int64 // the generation that it was last told, by workspace
	// values are the values' numbers of the versions that it knows, by register.
	values map[string]map[int64]string
}

// giveUp is how long a client repeats a change that was not answered.
const giveUp = 30 * time.Second

func (c *client) run(ops []op) {
	for i := range ops {
		<-time.After(ops[i].gap)
		c.do(&ops[i])
	}
}

// attempt is an operation under way.
type attempt struct {
	*op
	request    string
	begin, end int64
	floors     map[string]int64 // what somebody was told before it began
	jumps      int64            // of the clock, so far
	began      time.Duration
	writes     map[string]*write
	doubt      bool // an earlier try may have done something
	etagSent   string
	generation int64 // that is waited for
	container  container
}

// answer is what the answers have in common.
type answer struct {
	message    proto.Message
	workspace  *workspacev1.Workspace
	workspaces []*workspacev1.Workspace
	secrets    []*workspacev1.Secret
	versions   []*workspacev1.SecretVersion
	fetched    []*workspacev1.FetchedSecret
	generation int64
	changed    bool
	affected   int32
}

func (c *client) do(o *op) {
	if o.versions() {
		o = c.chooseVersion(o)
	}
	a := &attempt{op: o, writes: make(map[string]*write), jumps: c.jumped.Load()}
	if o.retry && o.changes() {
		a.request = fmt.Sprintf("request-%d-%d-%d", c.plan.seed, o.client, o.n)
	}
	c.prepare(a)
	a.begin, a.began = c.tick(), c.elapsed()
	a.floors = c.ledger.floors()
	if o.fromContainer() {
		a.container = c.chooseContainer(o)
	}
	c.noteWrites(a)

	ctx := context.Background()
	if o.away > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.away)
		defer cancel()
	}
	var ans answer
	var err error
	for tries := 0; ; tries++ {
		ans, err = c.try(ctx, a)
		if err == nil {
			break
		}
		unknown := !c.checkError(a, err)
		a.doubt = a.doubt || unknown
		if !unknown || a.request == "" || ctx.Err() != nil || c.elapsed()-a.began > giveUp {
			break
		}
		<-time.After(roll(c.plan.seed, tries, "retry", o.String()).between(0, 20*time.Millisecond<<min(tries, 10)))
	}
	a.end = c.tick()
	c.settle(a, ans, err)
	if err == nil && o.again && o.changes() && !o.validate {
		c.repeat(a, ans)
	}
}

// chooseVersion gives an operation a version of a secret: mostly of one that this client
// has set. One to roll back to is one whose value is known, so that the rollback is a
// write of that value; with none known another value is set instead.
func (c *client) chooseVersion(o *op) *op {
	chosen, d := *o, roll(c.plan.seed, o.client<<16|o.n, "version")
	if len(c.values) > 0 && !d.chance(5) {
		register := pick(d, slices.Sorted(maps.Keys(c.values))...)
		scope, key, _ := strings.Cut(register, "/")
		chosen.ws, chosen.live = scope, o.live && slices.Contains(fileKeys, key)
		chosen.nextStart = o.nextStart && scope == o.ws && key == o.key() // as the plan says
		if o.kind == opRollBack {
			chosen.set = map[string]string{key: o.set[o.key()]}
		} else {
			chosen.unset = []string{key}
		}
	}
	known := slices.Sorted(maps.Keys(c.values[secretRegister(chosen.ws, chosen.key())]))
	switch {
	case o.kind == opRollBack && (len(known) == 0 || len(known) == 1 && d.chance(2)):
		chosen.kind = opSet
	case o.kind == opRollBack:
		chosen.version = known[max(0, len(known)-1-d.IntN(4))]
		chosen.set = map[string]string{chosen.key(): c.values[secretRegister(chosen.ws, chosen.key())][chosen.version]}
	case len(known) > 0:
		chosen.version = max(1, known[len(known)-1]-int64(d.IntN(3)))
	default:
		chosen.version = 1 + int64(d.IntN(3))
	}
	return &chosen
}

// learn takes down which version has the value that was just set.
func (c *client) learn(a *attempt, ans answer) {
	if a.kind != opSet && a.kind != opRollBack || !c.tracked(a.ws) {
		return
	}
	register := secretRegister(a.ws, a.key())
	if c.values[register] == nil {
		c.values[register] = make(map[int64]string)
	}
	for _, secret := range ans.secrets {
		c.values[register][secret.GetVersion()] = a.set[a.key()]
	}
}

// prepare reads what the request is made of.
func (c *client) prepare(a *attempt) {
	if a.etag != "" && a.takesEtag() && a.ws != "" {
		a.etagSent = `"stale"`
		if a.etag == "current" {
			a.etagSent = c.currentEtag(a)
		}
	}
	if a.kind == opWait {
		switch a.waitFor {
		case "told":
			a.generation = c.told[a.ws]
		case "future":
			a.generation = c.told[a.ws] + 1000
		}
	}
}

func (c *client) currentEtag(a *attempt) string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	name := "workspaces/" + a.ws
	switch a.kind {
	case opSet, opUnset, opRollBack:
		resp, err := c.api.GetSecret(ctx, &workspacev1.GetSecretRequest{Name: name + "/secrets/" + a.key()})
		if err == nil {
			return resp.GetSecret().GetEtag()
		}
	default:
		resp, err := c.api.GetWorkspace(ctx, &workspacev1.GetWorkspaceRequest{Name: name})
		if err == nil {
			return resp.GetWorkspace().GetEtag()
		}
	}
	return `"none"`
}

// try makes the call once.
func (c *client) try(ctx context.Context, a *attempt) (answer, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	ans, err := c.call(ctx, a)
	c.count(a.kind, err)
	if err != nil {
		c.journal.add("%s -> %s", a.op, describeError(err))
	} else {
		c.journal.add("%s -> generation %d, changed %t", a.op, ans.generation, ans.changed)
	}
	return ans, err
}

func describeError(err error) string {
	st := status.Convert(err)
	return fmt.Sprintf("%s %s: %s", st.Code(), reasonOf(err), st.Message())
}

func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == server.ErrorDomain {
			return info.GetReason()
		}
	}
	return ""
}

// certain reports whether an error says that nothing was changed.
func certain(err error) bool {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.Aborted, codes.FailedPrecondition:
		return true
	case codes.ResourceExhausted:
		return reasonOf(err) != server.ReasonChangeInDoubt
	}
	return reasonOf(err) == server.ReasonDraining
}

// repeat sends the same request once more: it is answered as before.
func (c *client) repeat(a *attempt, first answer) {
	ctx, cancel := context.WithTimeout(context.Background(), a.timeout)
	defer cancel()
	second, err := c.call(ctx, a)
	c.count(a.kind, err)
	if c.jumped.Load() != a.jumps {
		c.noteSecondTime(a, err)
		return
	}
	if err != nil {
		c.checkError(a, err)
		c.journal.add("%s again -> %s", a.op, describeError(err))
		return
	}
	c.journal.add("%s again -> generation %d, changed %t", a.op, second.generation, second.changed)
	if !proto.Equal(first.message, second.message) {
		c.problem("%s: the same request was answered %v, and then %v", a.op, first.message, second.message)
	}
}

// noteSecondTime: the first answer is forgotten after an hour, by the daemon's
// clock, and the request is another one then. Whether it was forgotten the answer
// does not tell.
func (c *client) noteSecondTime(a *attempt, err error) {
	state := unknown
	if err == nil {
		state = perhaps
	}
	for register, w := range a.writes {
		again := c.ledger.begin(register, w.value, a.end, w.next)
		c.ledger.ended(again, state, c.tick())
	}
	c.noteBump(a, false)
}
