package sim

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/store"
)

// wanted are the registers that an operation writes, and their values.
func (s *scene) wanted(o *op) map[string]string {
	registers := make(map[string]string)
	if !o.changes() || o.validate || !s.tracked(o.ws) || o.versions() && o.kind != opRollBack {
		return registers
	}
	for key, value := range o.set {
		registers[secretRegister(o.ws, key)] = value
	}
	for _, key := range o.unset {
		registers[secretRegister(o.ws, key)] = ""
	}
	for field, value := range o.fields {
		registers[fieldRegister(o.ws, field)] = value
	}
	switch o.kind {
	case opStop:
		registers[fieldRegister(o.ws, fieldParked)] = "true"
	case opStart:
		registers[fieldRegister(o.ws, fieldParked)] = "false"
	}
	return registers
}

func (c *client) noteWrites(a *attempt) {
	for register, value := range c.wanted(a.op) {
		a.writes[register] = c.ledger.begin(register, value, a.begin, a.nextStart)
	}
}

// bumps says whether a change, if it changes anything, makes a generation of the
// workspace.
func (o *op) bumps() (may, must bool) {
	switch o.kind {
	case opSet, opUnset, opBatch, opRollBack:
		return !o.nextStart, !o.nextStart && o.ws != ""
	case opModel, opRestart, opStart:
		return true, true
	case opUpdate:
		seen, unseen := false, false
		for field := range o.fields {
			switch field {
			case fieldLabel, fieldGrace, fieldPolicy:
				unseen = true
			default:
				seen = true
			}
		}
		return seen, seen && !unseen
	}
	return false, false
}

// noteBump notes that a change made a generation (must), or may have.
func (c *client) noteBump(a *attempt, must bool) {
	may, sure := a.op.bumps()
	switch {
	case !may || a.validate:
	case a.ws == "":
		for _, id := range c.plan.stable {
			c.ledger.bumped(id, false)
		}
	case c.isStable(a.ws):
		c.ledger.bumped(a.ws, must && sure)
	}
}

// settle takes the outcome of an operation, and checks it.
func (c *client) settle(a *attempt, ans answer, err error) {
	again := c.jumped.Load() != a.jumps // it may have been done twice
	if err != nil {
		for register, w := range a.writes {
			if a.doubt {
				c.ledger.ended(w, unknown, a.end)
			} else {
				c.ledger.refused(register, w)
			}
		}
		if a.doubt {
			c.noteBump(a, false)
			if again {
				c.noteBump(a, false)
			}
		}
		return
	}
	if !again {
		c.checkChanged(a, ans)
	}
	for _, w := range a.writes {
		c.ledger.ended(w, acked, a.end)
	}
	if a.changes() && (ans.changed || again) {
		c.noteBump(a, ans.changed)
		if again {
			c.noteBump(a, false)
		}
	}
	if a.validate && a.changes() {
		return
	}
	if a.etagSent == `"stale"` && ans.workspace != nil {
		c.problem("%s was done, with an etag that never was", a.op)
	}
	if a.ws != "" && ans.generation > 0 {
		c.told[a.ws] = ans.generation
	}
	c.learn(a, ans)
	if a.fromContainer() {
		c.checkContainer(a, ans)
		return
	}
	c.checkGeneration(a, ans)
	c.checkVersions(a, ans)
	for _, w := range append(ans.workspaces, ans.workspace) {
		c.checkWorkspace(a, w)
	}
	if a.kind == opWait {
		c.checkWait(a, ans)
	}
}

// checkChanged checks promise 10: changed says whether anything differed.
func (c *client) checkChanged(a *attempt, ans answer) {
	if len(a.writes) == 0 || a.kind == opStart && c.report.Exits > 0 {
		return // one that has ended by itself is started, too
	}
	differs := false
	for register, w := range a.writes {
		// What waited for the next start is put into force by the same change again.
		differs = differs || !w.next && c.ledger.everNext(register) || c.ledger.mayDiffer(register, w.value, a.begin, a.end, w)
		if !ans.changed && !c.ledger.mayBe(register, w.value, a.begin, a.end, w) {
			c.problem("%s changed nothing, it says; %s", a.op, c.ledger.describe(register, a.begin, a.end))
		}
	}
	if ans.changed && !differs {
		c.problem("%s changed something, it says, and there was nothing to change", a.op)
	}
}

func (c *client) checkGeneration(a *attempt, ans answer) {
	uid := c.uidOf(a.ws)
	if uid == "" || !a.changes() {
		return
	}
	_, must := a.op.bumps()
	name := generationCounter(uid)
	if err := c.ledger.told(name, ans.generation, a.floors[name], must && ans.changed); err != nil {
		c.problem("%s: %v", a.op, err)
	}
	if a.changes() && !ans.changed && a.kind == opRestart {
		c.problem("%s: a restart changed nothing", a.op)
	}
	if n := int(ans.affected); n > len(c.plan.stable)+len(c.plan.mayflies) || a.nextStart && n > 0 {
		c.problem("%s: %d workspaces affected", a.op, n)
	}
}

func (c *client) checkVersions(a *attempt, ans answer) {
	if !c.tracked(a.ws) {
		return
	}
	for _, secret := range ans.secrets {
		name := versionCounter(a.ws, secret.GetKey())
		// What is only put into force keeps its version.
		counted := (a.kind == opSet || a.kind == opRollBack) && ans.changed && (a.nextStart || !c.ledger.everNext(secretRegister(a.ws, secret.GetKey())))
		if err := c.ledger.told(name, secret.GetVersion(), a.floors[name], counted); err != nil {
			c.problem("%s: %v", a.op, err)
		}
	}
	c.checkListed(a, ans.versions)
	if a.kind != opListSecrets {
		return
	}
	for _, key := range allKeys {
		there := slices.ContainsFunc(ans.secrets, func(s *workspacev1.Secret) bool { return s.GetKey() == key })
		register := secretRegister(a.ws, key)
		if !there && !c.ledger.mayBe(register, "", a.begin, a.end, nil) || there && !c.ledger.mayDiffer(register, "", a.begin, a.end, nil) {
			c.problem("%s: listed is %t; %s", a.op, there, c.ledger.describe(register, a.begin, a.end))
		}
	}
}

// checkListed checks a list of versions: the newest first, which alone is current.
func (c *client) checkListed(a *attempt, versions []*workspacev1.SecretVersion) {
	for i, v := range versions {
		if i > 0 && v.GetVersion() >= versions[i-1].GetVersion() || v.GetCurrent() != (i == 0) ||
			i == 0 && v.GetState() != workspacev1.SecretVersionState_SECRET_VERSION_STATE_ENABLED {
			c.problem("%s: listed are %v", a.op, versions)
			return
		}
	}
	if len(versions) > store.DefaultSecretVersions {
		c.problem("%s: %d versions are kept", a.op, len(versions))
	}
}

// checkWorkspace checks a workspace that somebody was shown.
func (c *client) checkWorkspace(a *attempt, w *workspacev1.Workspace) {
	if w == nil {
		return
	}
	id := strings.TrimPrefix(w.GetName(), "workspaces/")
	name := generationCounter(w.GetUid())
	if err := c.ledger.told(name, w.GetGeneration(), a.floors[name], false); err != nil {
		c.problem("%s: %v", a.op, err)
	}
	if w.GetObservedGeneration() > w.GetGeneration() {
		c.problem("%s: %s has observed generation %d of %d", a.op, id, w.GetObservedGeneration(), w.GetGeneration())
	}
	if !c.isStable(id) {
		return
	}
	if w.GetUid() != c.uidOf(id) {
		c.problem("%s: %s has uid %s, it was %s", a.op, id, w.GetUid(), c.uidOf(id))
	}
	for field, value := range fieldsOf(w) {
		c.checkRegister(a.op.String()+":", fieldRegister(id, field), value, a.begin, a.end)
	}
}

// checkWait checks that a wait which succeeded tells the truth: a container was
// started with the generation, or has taken it in.
func (c *client) checkWait(a *attempt, ans answer) {
	w := ans.workspace
	want := a.generation
	if want == 0 {
		want = a.floors[generationCounter(w.GetUid())]
	}
	if w.GetObservedGeneration() < want {
		c.problem("%s: waited for generation %d, and observed is %d", a.op, want, w.GetObservedGeneration())
	}
	for _, l := range c.fake.Launches(w.GetUid()) {
		if l.Instance.Generation >= want {
			return
		}
	}
	if c.scene.cycles.taken(w.GetUid()) < want {
		c.problem("%s: waited for generation %d, and no container ever had it", a.op, want)
	}
}

// checkStillWaiting checks that a wait which gave up had reason to: what it waited
// for had not come about, unless at this very moment.
func (c *client) checkStillWaiting(a *attempt) {
	d := c.current()
	if d == nil || a.generation == 0 {
		return
	}
	w, err := d.Store.Workspace(a.ws)
	if err != nil || w.UID != c.uidOf(a.ws) || w.Status.ObservedGeneration < a.generation {
		return
	}
	c.scene.mu.Lock()
	changed := c.changed[a.ws]
	c.scene.mu.Unlock()
	if w.Revision <= changed.revision && changed.at.Before(time.Now()) {
		c.problem("%s is still waiting for generation %d, observed is %d since %v", a.op, a.generation, w.Status.ObservedGeneration, changed.at.Sub(c.start))
	}
}

// struck reports whether a fault has struck a step.
func (in *injector) struck(step string) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, m := range fault.Moments {
		for _, action := range fault.Actions {
			if in.world.report.Struck[strikeKey(step, m, action)] > 0 {
				return true
			}
		}
	}
	return false
}

// checkError checks that a call may fail like that, and reports whether the
// error says that nothing was changed.
func (c *client) checkError(a *attempt, err error) bool {
	st := status.Convert(err)
	for _, text := range append([]string{st.Message()}, detailTexts(st)...) {
		if strings.Contains(text, marker) {
			c.problem("%s: a secret in the error %s", a.op, text)
		}
	}
	if why := c.unexpected(a, st.Code(), reasonOf(err)); why != "" {
		c.problem("%s: %s: %s", a.op, describeError(err), why)
	}
	return certain(err)
}

func detailTexts(st *status.Status) (texts []string) {
	for _, d := range st.Proto().GetDetails() {
		texts = append(texts, prototext.Format(d), string(d.GetValue()))
	}
	return texts
}

// unexpected says what is wrong with an error; nothing when it may come.
func (c *client) unexpected(a *attempt, code codes.Code, reason string) string {
	stable := a.ws == "" || c.isStable(a.ws)
	now := c.tick()
	may := func(register, value string) bool { return c.ledger.mayBe(register, value, a.begin, now, nil) }
	commits := a.changes() && c.faults.struck(store.Steps[0])
	ok := false
	switch code {
	case codes.Unavailable:
		ok = slices.Contains([]string{"", server.ReasonDraining, server.ReasonChangeInDoubt}, reason)
	case codes.Canceled:
		ok = a.away > 0
	case codes.DeadlineExceeded:
		ok = true
		if reason == server.ReasonStillWaiting {
			c.checkStillWaiting(a)
		}
	case codes.Internal:
		ok = commits
	case codes.ResourceExhausted:
		ok = commits && reason == server.ReasonDiskFull
	case codes.InvalidArgument:
		ok = a.kind == opWait && (a.waitFor == "future" || !stable)
	case codes.NotFound:
		secret := a.kind == opGetSecret || a.kind == opUnset && !a.missing
		secret = secret || a.versions() || a.kind == opVersions
		ok = !stable || secret && reason == server.ReasonSecretNotFound && may(secretRegister(a.ws, a.key()), "") ||
			a.versions() && reason == server.ReasonVersionNotFound // pushed out, or gone with its key
	case codes.AlreadyExists:
		ok = a.kind == opCreate
	case codes.Aborted:
		ok = a.etagSent != ""
	case codes.FailedPrecondition:
		switch reason {
		case server.ReasonWorkspaceStopped:
			ok = (a.kind == opRestart || a.kind == opWait) && (!stable || may(fieldRegister(a.ws, fieldParked), "true"))
		case server.ReasonWorkspaceDeleting:
			ok = !stable
		case server.ReasonModelKey:
			ok = !stable || may(fieldRegister(a.ws, fieldModelEnv), keyModel) || a.fields[fieldModelEnv] == keyModel
		case server.ReasonVersionDisabled:
			ok = a.kind == opRollBack
		case server.ReasonVersionDestroyed:
			ok = a.kind == opRollBack || a.kind == opEnable || a.kind == opDisable
		case server.ReasonVersionCurrent:
			ok = a.kind == opDisable || a.kind == opDestroy
		case server.ReasonNotLive: // what waits for the next start makes files of variables
			ok = a.live && c.plan.anyLater(func(o *op) bool {
				return slices.ContainsFunc(o.keysOf(), func(key string) bool { return slices.Contains(a.keysOf(), key) })
			})
		case server.ReasonRetriesExhausted, server.ReasonWorkspaceExited:
			ok = a.kind == opWait && c.report.Exits > 0
		case server.ReasonWorkspaceFailed:
			ok = a.kind == opWait && (!stable || may(fieldRegister(a.ws, fieldImage), imageBad))
		}
	}
	if !ok && (!a.fromContainer() || !c.mayRefuse(a, code, reason)) {
		return "it must not fail like that"
	}
	if reason == "" && !slices.Contains([]codes.Code{codes.Unavailable, codes.Canceled, codes.DeadlineExceeded}, code) {
		return "it has no reason"
	}
	return ""
}

// count counts a call.
func (w *world) count(method string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Operations++
	w.report.call(method, status.Code(err).String())
}

// floors returns all counters.
func (l *ledger) floors() map[string]int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make(map[string]int64)
	for name, c := range l.counters {
		all[name] = c.floor
	}
	return all
}
