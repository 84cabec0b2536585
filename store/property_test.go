package store

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/workspaced/workspaced/store/seal"
)

// The model: what the store must say, in the plainest possible code.
type model struct {
	workspaces map[string]*modelWorkspace
	globals    modelSecrets
}

type modelWorkspace struct {
	uid                                  string
	labels                               map[string]string
	image, signal, model                 string
	modelEnv                             []string
	parked, deleting, keepVolumes        bool
	files                                bool
	generation, specGeneration, observed int64
	reason                               ChangeReason
	secrets                              modelSecrets
}

type modelSecrets struct {
	values   map[string]string
	versions map[string]int64 // also of deleted keys
	delivery map[string]Delivery
	staged   map[string]bool // the last change of the key waits for the next start
	history  map[string][]modelVersion
}

// modelVersion is a version of a secret; the last one in its history is current.
type modelVersion struct {
	number   int64
	value    string
	delivery Delivery
	state    VersionState
	restored int64
}

func newModelSecrets() modelSecrets {
	return modelSecrets{map[string]string{}, map[string]int64{}, map[string]Delivery{}, map[string]bool{}, map[string][]modelVersion{}}
}

// update does what u says and returns the keys that changed.
func (m *modelSecrets) update(u SecretsUpdate) []string {
	var changed []string
	for _, key := range u.Delete {
		_, ok := m.values[key]
		if _, known := m.versions[key]; ok || known && m.staged[key] && !u.NextStart {
			delete(m.values, key)
			delete(m.delivery, key)
			delete(m.history, key)
			m.staged[key] = u.NextStart
			changed = append(changed, key)
		}
	}
	for _, s := range u.Set {
		old, ok := m.values[s.Key]
		delivery := m.after(s)
		switch {
		case !ok || old != s.Value.Reveal() || delivery != m.delivery[s.Key]:
			m.values[s.Key], m.delivery[s.Key] = s.Value.Reveal(), delivery
			m.versions[s.Key]++
			history := append(m.history[s.Key], modelVersion{m.versions[s.Key], s.Value.Reveal(), delivery, VersionEnabled, 0})
			m.history[s.Key] = history[max(0, len(history)-modelVersions):]
		case !m.staged[s.Key] || u.NextStart:
			continue
		}
		m.staged[s.Key] = u.NextStart
		changed = append(changed, s.Key)
	}
	return changed
}

// modelVersions is how many versions the store that is tested keeps.
const modelVersions = 3

// version returns a version of a key, or the error that is due.
func (m *modelSecrets) version(key string, number int64) (v *modelVersion, current bool, err error) {
	history := m.history[key]
	i := slices.IndexFunc(history, func(v modelVersion) bool { return v.number == number })
	if i < 0 {
		return nil, false, ErrNotFound
	}
	return &history[i], i == len(history)-1, nil
}

// setState sets a version's state.
func (m *modelSecrets) setState(key string, number int64, state VersionState) (changed bool, err error) {
	v, current, err := m.version(key, number)
	switch {
	case err != nil:
		return false, err
	case current && state != VersionEnabled:
		return false, ErrVersionCurrent
	case v.state == VersionDestroyed && state != VersionDestroyed:
		return false, ErrVersionDestroyed
	}
	changed = v.state != state
	v.state = state
	return changed, nil
}

// rollBack returns the update that has the same effect but for what is on record
// of it, or the error that is due.
func (m *modelSecrets) rollBack(back *RollBack, u SecretsUpdate) (SecretsUpdate, error) {
	v, _, err := m.version(back.Key, back.Version)
	switch {
	case err != nil:
		return u, err
	case v.state == VersionDisabled:
		return u, ErrVersionDisabled
	case v.state == VersionDestroyed:
		return u, ErrVersionDestroyed
	}
	u.Set = []SecretValue{{Key: back.Key, Value: seal.New([]byte(v.value)), Delivery: v.delivery}}
	return u, nil
}

// rolledBack takes note of a rollback that was done.
func (m *modelSecrets) rolledBack(back *RollBack, before int64) {
	if history := m.history[back.Key]; m.versions[back.Key] != before {
		history[len(history)-1].restored = back.Version
	}
}

// after is how the key will be delivered.
func (m *modelSecrets) after(s SecretValue) Delivery {
	return cmp.Or(s.Delivery, m.delivery[s.Key], DeliverySpec)
}

func (w *modelWorkspace) bump(reason ChangeReason) {
	w.generation++
	w.reason = reason
}

func (w *modelWorkspace) vars() []string {
	if len(w.modelEnv) == 0 {
		return []string{DefaultModelEnv}
	}
	return w.modelEnv
}

// machine runs a store and its model side by side.
type machine struct {
	*harness
	model model
	// follower reads the feed all the time, newcomer from the start each time.
	follower follower
	requests []doneRequest
	revision uint64
}

// doneRequest is a call that was done with a request id, to be repeated.
type doneRequest struct {
	do     func(Options) (Result, error)
	opts   Options
	result Result
	time   time.Time
}

var (
	genID     = rapid.SampledFrom([]string{"a", "b", "c"})
	genKey    = rapid.SampledFrom([]string{"K", "L", "M", DefaultModelEnv})
	genValue  = rapid.SampledFrom([]string{"", "1", "2", "a longer value"})
	genSecret = rapid.SampledFrom([]string{"", "1", "2", "a longer value", "1\x002"})
	genWay    = rapid.SampledFrom([]Delivery{"", "", "", DeliverySpec, DeliveryEnv, DeliveryFiles})
	genChance = func(n int) *rapid.Generator[bool] {
		return rapid.Map(rapid.IntRange(1, n), func(i int) bool { return i == n })
	}
)

// drawVersion draws a version of the key, or one that is no more or not yet there.
func drawVersion(t *rapid.T, s *modelSecrets, key string) int64 {
	return max(1, s.versions[key]-rapid.Int64Range(-1, modelVersions+1).Draw(t, "age"))
}

// secretsOf returns the secrets of a workspace, those of none that is there, or,
// without an id, the global ones.
func (m *machine) secretsOf(id string) *modelSecrets {
	if id == "" {
		return &m.model.globals
	}
	if w := m.model.workspaces[id]; w != nil {
		return &w.secrets
	}
	return &modelSecrets{}
}

func drawUpdate(t *rapid.T) SecretsUpdate {
	keys := rapid.SliceOfNDistinct(genKey, 0, 4, rapid.ID[string]).Draw(t, "keys")
	u := SecretsUpdate{NextStart: genChance(3).Draw(t, "nextStart"), MustExist: genChance(3).Draw(t, "mustExist")}
	for _, key := range keys {
		if genChance(3).Draw(t, "delete") {
			u.Delete = append(u.Delete, key)
		} else {
			v := value(key, genSecret.Draw(t, "value"))
			v.Delivery = genWay.Draw(t, "delivery")
			u.Set = append(u.Set, v)
		}
	}
	return u
}

// call does one change, sometimes with a request id, sometimes only for show
// first, and checks that the outcome is the expected error, or as expected.
func (m *machine) call(t *rapid.T, want error, changed bool, do func(Options) (Result, error)) Result {
	t.Helper()
	before := dump(t, m.db)
	if genChance(4).Draw(t, "validateOnly") {
		r, err := do(Options{ValidateOnly: true})
		if !sameError(err, want) || r.Changed != changed {
			t.Fatalf("validate only: got %+v, %v, want %v, changed %t", r, err, want, changed)
		}
		if diff := gocmp.Diff(before, dump(t, m.db)); diff != "" {
			t.Fatalf("validate only changed something: %s", diff)
		}
	}
	var opts Options
	if genChance(3).Draw(t, "request") {
		opts = request(fmt.Sprint("r", len(m.requests)), "print")
	}
	r, err := do(opts)
	if !sameError(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
	if err != nil {
		if diff := gocmp.Diff(before, dump(t, m.db)); diff != "" {
			t.Fatalf("an error changed something: %s", diff)
		}
		return r
	}
	if r.Changed != changed {
		t.Fatalf("changed is %t", r.Changed)
	}
	if opts.RequestID != "" {
		m.requests = append(m.requests, doneRequest{do, opts, r, m.clock.now})
	}
	if revision := m.Revision(); revision < m.revision {
		t.Fatalf("revision %d after %d", revision, m.revision)
	}
	m.revision = m.Revision()
	if id := r.Workspace.ID; id != "" {
		w, err := m.Workspace(id)
		if diff := gocmp.Diff(w, r.Workspace); diff != "" || err != nil {
			t.Fatalf("the result is not what is stored: %v %s", err, diff)
		}
	}
	return r
}

func sameError(got, want error) bool {
	return errors.Is(got, want)
}

// editable returns the model's workspace, or the error that is due.
func (m *machine) editable(id string) (*modelWorkspace, error) {
	w := m.model.workspaces[id]
	switch {
	case w == nil:
		return nil, ErrNotFound
	case w.deleting:
		return w, ErrDeleting
	}
	return w, nil
}

func (m *machine) actions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"create": func(t *rapid.T) {
			id, u := genID.Draw(t, "id"), drawUpdate(t)
			var want error
			if m.model.workspaces[id] != nil {
				want = ErrExists
			} else if slices.ContainsFunc(u.Set, func(s SecretValue) bool { return s.Key == DefaultModelEnv }) {
				want = ErrModelKey
			} else {
				want = needsFiles(newModelSecrets(), u, false)
			}
			r := m.call(t, want, want == nil, func(o Options) (Result, error) {
				return m.CreateWorkspace(ctx, NewWorkspace{ID: id, Spec: Spec{Image: "i"}, Secrets: u.Set}, o)
			})
			if want == nil {
				w := &modelWorkspace{uid: r.Workspace.UID, image: "i", specGeneration: 1, secrets: newModelSecrets()}
				w.bump(ReasonCreated)
				w.secrets.update(SecretsUpdate{Set: u.Set})
				m.model.workspaces[id] = w
			}
		},
		"update": func(t *rapid.T) {
			id := genID.Draw(t, "id")
			label, image, signal, mod := genValue.Draw(t, "label"), genValue.Draw(t, "image"), genValue.Draw(t, "signal"), genValue.Draw(t, "model")
			modelEnv := rapid.SampledFrom([][]string{nil, {}, {"K"}, {"X"}, {DefaultModelEnv}}).Draw(t, "modelEnv")
			files := rapid.Bool().Draw(t, "files")
			w, want := m.editable(id)
			after := modelWorkspace{}
			if want == nil {
				after = *w
				after.labels = map[string]string{"l": label}
				after.image, after.signal, after.model, after.modelEnv, after.files = image, signal, mod, modelEnv, files
				switch {
				case image != w.image || files != w.files || !slices.Equal(after.vars(), w.vars()):
					after.bump(ReasonSpec)
					after.specGeneration = after.generation
				case mod != w.model:
					after.bump(ReasonModel)
				}
			}
			changed := want == nil && (after.generation != w.generation || signal != w.signal ||
				!maps.Equal(after.labels, w.labels) || !slices.Equal(after.modelEnv, w.modelEnv))
			if changed {
				for _, key := range after.vars() {
					if _, taken := w.secrets.values[key]; taken {
						want, changed = ErrModelKey, false
					}
				}
				for key, v := range w.secrets.values {
					if want == nil && !files && strings.Contains(v, "\x00") && w.secrets.delivery[key] == DeliverySpec {
						want, changed = ErrNeedsFiles, false
					}
				}
			}
			etag := ""
			if before, err := m.Workspace(id); err == nil {
				etag = before.Etag()
			}
			r := m.call(t, want, changed, func(o Options) (Result, error) {
				return m.UpdateWorkspace(ctx, id, func(e *Editable) error {
					e.Labels = map[string]string{"l": label}
					e.Spec.Image, e.Spec.StopSignal, e.Spec.ModelEnv, e.Model = image, signal, modelEnv, mod
					e.Spec.SecretDelivery = DeliveryEnv
					if files {
						e.Spec.SecretDelivery = DeliveryFiles
					}
					return nil
				}, o)
			})
			if want == nil {
				if (r.Workspace.Etag() != etag) != changed {
					t.Fatalf("etag %s after %s, changed is %t", r.Workspace.Etag(), etag, changed)
				}
				*w = after
			}
		},
		"secrets": func(t *rapid.T) {
			id, u := genID.Draw(t, "id"), drawUpdate(t)
			w, want := m.editable(id)
			var changed []string
			if want == nil {
				want = cmp.Or(refuses(w.secrets, u, w.vars()), needsFiles(w.secrets, u, w.files))
			}
			if want == nil {
				changed = w.secrets.update(u)
				if len(changed) > 0 && !u.NextStart {
					w.bump(ReasonSecret)
				}
			}
			m.call(t, want, len(changed) > 0, func(o Options) (Result, error) { return m.UpdateSecrets(ctx, in(id), u, o) })
		},
		"roll back": func(t *rapid.T) {
			id, key := genID.Draw(t, "id"), genKey.Draw(t, "key")
			back := &RollBack{key, drawVersion(t, m.secretsOf(id), key)}
			u := SecretsUpdate{NextStart: genChance(3).Draw(t, "nextStart")}
			w, want := m.editable(id)
			set := u
			if want == nil {
				if set, want = w.secrets.rollBack(back, u); want == nil {
					want = needsFiles(w.secrets, set, w.files)
				}
			}
			var changed []string
			if want == nil {
				before := w.secrets.versions[back.Key]
				changed = w.secrets.update(set)
				w.secrets.rolledBack(back, before)
				if len(changed) > 0 && !u.NextStart {
					w.bump(ReasonSecret)
				}
			}
			u.RollBack = back
			m.call(t, want, len(changed) > 0, func(o Options) (Result, error) { return m.UpdateSecrets(ctx, in(id), u, o) })
		},
		"roll back a global secret": func(t *rapid.T) {
			key := genKey.Draw(t, "key")
			back := &RollBack{key, drawVersion(t, &m.model.globals, key)}
			u := SecretsUpdate{NextStart: genChance(3).Draw(t, "nextStart")}
			set, want := m.model.globals.rollBack(back, u)
			if want == nil {
				want = needsFiles(m.model.globals, set, false)
			}
			before := m.model.globals.versions[back.Key]
			u.RollBack = back
			m.updateGlobals(t, u, set, want)
			if want == nil {
				m.model.globals.rolledBack(back, before)
			}
		},
		"set a version's state": func(t *rapid.T) {
			id, key := rapid.SampledFrom([]string{"a", "b", "c", ""}).Draw(t, "id"), genKey.Draw(t, "key")
			secrets := m.secretsOf(id)
			version := drawVersion(t, secrets, key)
			state := rapid.SampledFrom([]VersionState{VersionEnabled, VersionDisabled, VersionDestroyed}).Draw(t, "state")
			var want error
			if id != "" {
				_, want = m.editable(id)
			}
			changed := false
			if want == nil {
				changed, want = secrets.setState(key, version, state)
			}
			m.call(t, want, changed, func(o Options) (Result, error) {
				return m.SetVersionState(ctx, Scope{WorkspaceID: id}, key, version, state, o)
			})
		},
		"global secrets": func(t *rapid.T) {
			u := drawUpdate(t)
			m.updateGlobals(t, u, u, cmp.Or(refuses(m.model.globals, u, nil), needsFiles(m.model.globals, u, false)))
		},
		"restart": func(t *rapid.T) {
			id := genID.Draw(t, "id")
			w, want := m.editable(id)
			if want == nil && w.parked {
				want = ErrParked
			}
			if want == nil {
				w.bump(ReasonRestart)
			}
			m.call(t, want, want == nil, func(o Options) (Result, error) { return m.RestartWorkspace(ctx, id, o) })
		},
		"stop": func(t *rapid.T) {
			id := genID.Draw(t, "id")
			w, want := m.editable(id)
			changed := want == nil && !w.parked
			if changed {
				w.parked = true
			}
			m.call(t, want, changed, func(o Options) (Result, error) { return m.StopWorkspace(ctx, id, o) })
		},
		"start": func(t *rapid.T) {
			id := genID.Draw(t, "id")
			w, want := m.editable(id)
			changed := want == nil && w.parked
			if changed {
				w.parked = false
				w.bump(ReasonStart)
			}
			m.call(t, want, changed, func(o Options) (Result, error) { return m.StartWorkspace(ctx, id, o) })
		},
		"delete": func(t *rapid.T) {
			id, keep := genID.Draw(t, "id"), rapid.Bool().Draw(t, "keep")
			w, want := m.editable(id)
			changed := false
			if w != nil {
				want = nil
				changed = !w.deleting || w.keepVolumes && !keep
				if changed {
					w.deleting, w.keepVolumes = true, keep
				}
			}
			m.call(t, want, changed, func(o Options) (Result, error) { return m.DeleteWorkspace(ctx, id, keep, o) })
		},
		"finish deletion": func(t *rapid.T) {
			id := genID.Draw(t, "id")
			w := m.model.workspaces[id]
			if w == nil || !w.deleting {
				t.Skip("nothing to finish")
			}
			if err := m.FinishDeletion(ctx, id, w.uid); err != nil {
				t.Fatal(err)
			}
			delete(m.model.workspaces, id)
		},
		"status": func(t *rapid.T) {
			id := genID.Draw(t, "id")
			w := m.model.workspaces[id]
			if w == nil {
				t.Skip("no workspace")
			}
			observed := rapid.Int64Range(w.observed, w.generation).Draw(t, "observed")
			if _, err := m.UpdateStatus(ctx, id, w.uid, func(_ Workspace, st *Status) { st.ObservedGeneration = observed }); err != nil {
				t.Fatal(err)
			}
			w.observed = observed
		},
		"repeat a request": func(t *rapid.T) {
			if len(m.requests) == 0 {
				t.Skip("no requests")
			}
			q := rapid.SampledFrom(m.requests).Draw(t, "request")
			if m.clock.now.Sub(q.time) > requestAge-time.Minute {
				t.Skip("too old")
			}
			before := dump(t, m.db)
			r, err := q.do(q.opts)
			if diff := gocmp.Diff(q.result, r); diff != "" || err != nil {
				t.Fatalf("another answer: %v %s", err, diff)
			}
			q.opts.Fingerprint = []byte("other")
			if _, err := q.do(q.opts); !errors.Is(err, ErrRequestReused) {
				t.Fatalf("another request: got %v", err)
			}
			if diff := gocmp.Diff(before, dump(t, m.db)); diff != "" {
				t.Fatalf("it changed something: %s", diff)
			}
		},
		"time passes": func(t *rapid.T) { m.clock.Add(25 * time.Minute) },
		"reopen": func(t *rapid.T) {
			before := dump(t, m.db)
			m.reopen()
			m.db.NoSync = true
			if diff := gocmp.Diff(before, dump(t, m.db)); diff != "" {
				t.Fatalf("reopening changed something: %s", diff)
			}
			if m.Revision() != m.revision {
				t.Fatalf("revision %d, was %d", m.Revision(), m.revision)
			}
		},
		"": m.check,
	}
}

// updateGlobals does an update of global secrets; what it does to the model says
// set.
func (m *machine) updateGlobals(t *rapid.T, u, set SecretsUpdate, want error) {
	var changed []string
	affected := 0
	if want == nil {
		changed = m.model.globals.update(set)
		for _, w := range m.model.workspaces {
			sees := slices.ContainsFunc(changed, func(key string) bool {
				_, own := w.secrets.values[key]
				carried := w.model != "" && slices.Contains((&Spec{ModelEnv: w.modelEnv}).ModelVars(), key)
				return !own && !carried
			})
			if sees && !w.deleting && !u.NextStart {
				w.bump(ReasonGlobalSecret)
				affected++
			}
		}
	}
	r := m.call(t, want, len(changed) > 0, func(o Options) (Result, error) { return m.UpdateSecrets(ctx, Scope{}, u, o) })
	if r.Affected != affected {
		t.Fatalf("affected %d, want %d", r.Affected, affected)
	}
}

// refuses returns the error that is due to an update.
func refuses(s modelSecrets, u SecretsUpdate, vars []string) error {
	for _, v := range u.Set {
		if slices.Contains(vars, v.Key) {
			return ErrModelKey
		}
	}
	for _, key := range u.Delete {
		if _, found := s.values[key]; !found && u.MustExist && (!s.staged[key] || u.NextStart) {
			return ErrNotFound
		}
	}
	return nil
}

// needsFiles returns the error that is due to a value that an environment can't
// carry.
func needsFiles(s modelSecrets, u SecretsUpdate, files bool) error {
	for _, v := range u.Set {
		if d := s.after(v); strings.Contains(v.Value.Reveal(), "\x00") && d != DeliveryFiles && (d != DeliverySpec || !files) {
			return ErrNeedsFiles
		}
	}
	return nil
}

// check compares all that the store says with the model.
func (m *machine) check(t *rapid.T) {
	m.revision = m.Revision()
	m.t, m.follower.h = t, m.harness
	ws, _, err := m.ListWorkspaces("", 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(ws) != len(m.model.workspaces) {
		t.Fatalf("%d workspaces, want %d", len(ws), len(m.model.workspaces))
	}
	checkShared(t, m.Store, ws)
	for _, w := range ws {
		got := modelWorkspace{
			uid: w.UID, labels: w.Labels, image: w.Spec.Image, signal: w.Spec.StopSignal, model: w.Model,
			modelEnv: w.Spec.ModelEnv, files: w.Spec.SecretDelivery == DeliveryFiles, parked: w.Parked, deleting: w.Deleting != nil,
			keepVolumes: w.Deleting != nil && w.Deleting.KeepVolumes,
			generation:  w.Generation, specGeneration: w.SpecGeneration, observed: w.Status.ObservedGeneration, reason: w.ChangeReason,
		}
		want := *m.model.workspaces[w.ID]
		secrets := want.secrets
		want.secrets = modelSecrets{}
		if len(want.modelEnv) == 0 {
			want.modelEnv = nil
		}
		if diff := gocmp.Diff(want, got, gocmp.AllowUnexported(modelWorkspace{}, modelSecrets{})); diff != "" {
			t.Fatalf("%s: %s", w.ID, diff)
		}
		if w.PendingSince.IsZero() != (want.generation <= want.observed) {
			t.Fatalf("%s: pending since %v with generation %d, observed %d", w.ID, w.PendingSince, want.generation, want.observed)
		}
		m.checkSecrets(t, in(w.ID), secrets)
		merged := maps.Clone(m.model.globals.values)
		maps.Copy(merged, secrets.values)
		if diff := gocmp.Diff(merged, m.values(w.ID)); diff != "" {
			t.Fatalf("%s: snapshot %s", w.ID, diff)
		}
	}
	m.checkSecrets(t, Scope{}, m.model.globals)

	rows := dump(t, m.db)
	m.follower.follow(1)
	if len(rows["rollouts"]) == 0 { // it is told of what has reached the records
		m.follower.check()
	}
	newcomer := follower{h: m.harness}
	newcomer.sync(1)
	newcomer.check()
	if n := len(rows["feed"]); n != len(ws)+len(rows["removed"]) {
		t.Fatalf("%d rows in the feed, %d workspaces, %d removed", n, len(ws), len(rows["removed"]))
	}
	if len(rows["requests"]) != len(rows["requests_by_expiry"]) {
		t.Fatalf("%d requests, %d by expiry", len(rows["requests"]), len(rows["requests_by_expiry"]))
	}
}

func (m *machine) checkSecrets(t *rapid.T, scope Scope, want modelSecrets) {
	secrets, _, err := m.ListSecrets(scope, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	for _, s := range secrets {
		got[s.Key] = s.Version
		if s.Delivery != want.delivery[s.Key] {
			t.Fatalf("%s is delivered by %s", s.Key, s.Delivery)
		}
		if s.Size != len(want.values[s.Key]) {
			t.Fatalf("%s has size %d", s.Key, s.Size)
		}
	}
	versions := map[string]int64{}
	for key := range want.values {
		versions[key] = want.versions[key]
	}
	if diff := gocmp.Diff(versions, got); diff != "" {
		t.Fatalf("%+v: versions %s", scope, diff)
	}
	for key := range want.values {
		list, _, err := m.ListSecretVersions(scope, key, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		var history []modelVersion
		for i, v := range slices.Backward(list) {
			history = append(history, modelVersion{v.Version, want.value(key, v.Version), v.Delivery, v.State, v.Restored})
			if v.Current != (i == 0) || v.Size != len(want.value(key, v.Version)) {
				t.Fatalf("%s is %+v", key, v)
			}
		}
		if diff := gocmp.Diff(want.history[key], history, gocmp.AllowUnexported(modelVersion{})); diff != "" {
			t.Fatalf("%+v: versions of %s %s", scope, key, diff)
		}
	}
	o, err := m.owner(scope)
	if err != nil {
		t.Fatal(err)
	}
	checkSums(t, m.harness, o)
}

// value is what a version has, or had.
func (m *modelSecrets) value(key string, number int64) string {
	v, _, err := m.version(key, number)
	if err != nil {
		return ""
	}
	return v.value
}

// Whatever is done in whatever order, the store says what the model says, its
// feed tells it to everybody, and reopening changes nothing.
func TestStore_EqualsItsModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		h := newHarness(t)
		defer func() { _ = h.Close() }()
		h.cfg.SecretVersions = modelVersions
		h.reopen()
		var steps steps
		if rapid.Bool().Draw(rt, "rollouts") { // no change of global secrets reaches the records at once
			steps = newSteps(h, 0, 1)
		}
		actions := newMachine(rt, h).actions()
		actions["roll out"] = func(t *rapid.T) {
			if !steps.step(h) {
				t.Skip("nothing to roll out")
			}
		}
		rotated := false
		actions["rotate the key"] = func(t *rapid.T) {
			if rotated {
				t.Skip("once is enough: it syncs a new file")
			}
			rotated = true
			must(h.RotateKey(ctx, Options{}))(t)
			h.keptUp()
			h.db.NoSync = true // of the new file
		}
		rt.Repeat(actions)
	})
}

func newMachine(t *rapid.T, h *harness) *machine {
	h.t, h.db.NoSync = t, true
	return &machine{
		harness:  h,
		model:    model{workspaces: map[string]*modelWorkspace{}, globals: newModelSecrets()},
		follower: follower{h: h, known: map[string]Workspace{}},
	}
}
