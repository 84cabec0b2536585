package sim

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Kinds of operations: the RPCs, and for global secrets their own.
const (
	opCreate      = "CreateWorkspace"
	opGet         = "GetWorkspace"
	opList        = "ListWorkspaces"
	opUpdate      = "UpdateWorkspace"
	opDelete      = "DeleteWorkspace"
	opRestart     = "RestartWorkspace"
	opStop        = "StopWorkspace"
	opStart       = "StartWorkspace"
	opModel       = "SetModel"
	opSet         = "SetSecret"
	opUnset       = "DeleteSecret"
	opBatch       = "BatchUpdateSecrets"
	opListSecrets = "ListSecrets"
	opGetSecret   = "GetSecret"
	opRollBack    = "RollBackSecret"
	opVersions    = "ListSecretVersions"
	opEnable      = "EnableSecretVersion"
	opDisable     = "DisableSecretVersion"
	opDestroy     = "DestroySecretVersion"
	opBeat        = "Heartbeat"
	opFetch       = "FetchSecrets"
	opWait        = "WaitWorkspace"
	opWatch       = "WatchWorkspaces" // only watchers do it
)

// op is one call of a client. What it sends may also depend on what the client
// was told before, where that is said.
type op struct {
	client, n int
	kind      string
	ws        string // empty: global secrets
	gap       time.Duration

	set       map[string]string // secrets: the value's number, see secretValue
	unset     []string          // their keys; also of what only reads one, or its versions
	nextStart bool
	live      bool
	version   int64 // of the secret: one of which the client knows the value, if it does
	missing   bool  // allow_missing
	fields    map[string]string
	keep      bool // keep_volumes

	etag     string // "current" or "stale", of what the client has read just before
	validate bool
	retry    bool          // with a request_id, until there is an answer
	again    bool          // after it was answered, the same request once more
	timeout  time.Duration // of each try
	away     time.Duration // the caller goes away after this; 0: never
	waitFor  string        // Wait's generation: "newest", "told" or "future"
}

// Fields of a workspace that can be changed, each a register of its own.
const (
	fieldImage    = "image"
	fieldEnv      = "env"
	fieldModelEnv = "model_env"
	fieldLabel    = "label"
	fieldGrace    = "grace"
	fieldPolicy   = "policy"
	fieldModel    = "model"
	fieldParked   = "parked"
)

// keys are used for own and for global secrets alike, so that they hide each
// other. keyModel may also carry the model.
const keyModel = "K3"

var keys = []string{"K1", "K2", keyModel}

// fileKeys are of secrets that are files in every container, always: they can be
// changed as it runs.
var fileKeys = []string{"F1", "F2"}

var allKeys = slices.Concat(keys, fileKeys)

// deliveryOf is what a change says of a key.
func deliveryOf(key string) workspacev1.SecretDelivery {
	if slices.Contains(fileKeys, key) {
		return workspacev1.SecretDelivery_SECRET_DELIVERY_FILES
	}
	return workspacev1.SecretDelivery_SECRET_DELIVERY_UNSPECIFIED
}

// secretValue is the value of which only the number is written down.
func secretValue(number string) string { return marker + number }

var opKinds = []weighted[string]{
	{20, opSet}, {5, opUnset}, {7, opBatch}, {4, opModel}, {9, opUpdate}, {8, opRestart}, {4, opStop}, {6, opStart},
	{6, opCreate}, {6, opDelete}, {4, opGet}, {3, opList}, {3, opListSecrets}, {2, opGetSecret}, {12, opWait},
	{5, opRollBack}, {1, opVersions}, {1, opEnable}, {2, opDisable}, {2, opDestroy}, {2, opBeat}, {4, opFetch},
}

func drawOp(p *plan, client, i int) op {
	d := roll(p.seed, client<<16|i, "op")
	o := op{
		client: client, n: i, kind: pickWeighted(d, opKinds),
		timeout: pickWeighted(d, []weighted[time.Duration]{{8, 30 * time.Second}, {1, time.Second}, {1, 5 * time.Millisecond}}),
		retry:   !d.chance(3), validate: d.chance(15), missing: d.chance(2), keep: d.chance(3),
	}
	o.again = o.retry && d.chance(6)
	if d.chance(10) {
		o.away = d.between(1, 30*time.Millisecond)
	}
	if d.chance(8) {
		o.etag = pick(d, "current", "stale")
	}
	number := fmt.Sprintf("v%d.%d", client, i)
	if d.chance(4) { // what is there already, perhaps
		number = pick(d, "v", fmt.Sprintf("v%d.%d", client, max(0, i-1-d.IntN(3))))
	}
	o.ws = pick(d, p.stable...)
	if d.chance(4) {
		o.ws = pick(d, p.mayflies...)
	}
	switch o.kind {
	case opCreate:
		o.ws = pick(d, p.mayflies...)
		o.set = drawSecrets(d, o.pool(d), number, d.IntN(2))
		o.fields = map[string]string{fieldImage: pickWeighted(d, images)}
	case opDelete:
		o.ws = pick(d, p.mayflies...)
	case opSet, opRollBack: // the value that one goes back to it knows later
		o.scope(d)
		o.set = drawSecrets(d, o.pool(d), number, 1)
		o.apply(d)
	case opUnset:
		o.scope(d)
		o.unset = []string{pick(d, o.pool(d)...)}
		o.apply(d)
	case opBatch:
		o.scope(d)
		pool := o.pool(d)
		o.set = drawSecrets(d, pool, number, d.IntN(3))
		if free := slices.DeleteFunc(slices.Clone(pool), func(k string) bool { return o.set[k] != "" }); len(free) > 0 {
			o.unset = []string{pick(d, free...)}
		}
		o.apply(d)
	case opListSecrets, opGetSecret, opVersions, opEnable, opDisable, opDestroy:
		o.scope(d)
		o.unset = []string{pick(d, allKeys...)}
	case opBeat, opFetch:
		o.ws = pick(d, p.stable...)
	case opModel:
		o.fields = map[string]string{fieldModel: pick(d, number, "", "m")}
	case opUpdate:
		o.fields = drawFields(d, number)
	case opWait:
		o.waitFor = pick(d, "newest", "told", "told", "future")
		o.timeout = pick(d, 100*time.Millisecond, 5*time.Second, 2*time.Minute)
	}
	return o
}

// scope makes some operations on secrets global.
func (o *op) scope(d dice) {
	if d.chance(5) {
		o.ws = ""
	}
}

// pool draws of which keys an operation is: of variables, or of files, which it may
// change as they are used.
func (o *op) pool(d dice) []string {
	if d.chance(4) {
		o.live = o.kind != opCreate && d.chance(2)
		return fileKeys
	}
	return keys
}

// apply draws when a change of secrets is applied, if it does not say so already.
func (o *op) apply(d dice) { o.nextStart = d.chance(8) && !o.live }

// keysOf are the keys of secrets that it is about.
func (o *op) keysOf() []string { return append(slices.Sorted(maps.Keys(o.set)), o.unset...) }

func drawSecrets(d dice, pool []string, number string, n int) map[string]string {
	set := make(map[string]string)
	for range n {
		set[pick(d, pool...)] = number
	}
	return set
}

func drawFields(d dice, number string) map[string]string {
	fields := make(map[string]string)
	for range pick(d, 1, 1, 2) {
		switch field := pick(d, fieldImage, fieldEnv, fieldModelEnv, fieldLabel, fieldGrace, fieldPolicy, fieldModel); field {
		case fieldImage:
			fields[field] = pickWeighted(d, images)
		case fieldModelEnv:
			fields[field] = pick(d, "", "M", keyModel)
		case fieldGrace:
			fields[field] = pick(d, "0s", "1s", "20s")
		case fieldPolicy:
			fields[field] = pick(d, "ALWAYS/0", "ALWAYS/2", "ON_FAILURE/0", "ON_FAILURE/1", "NEVER/0")
		default:
			fields[field] = number
		}
	}
	return fields
}

// changes reports whether it is a change.
func (o *op) changes() bool {
	switch o.kind {
	case opGet, opList, opListSecrets, opGetSecret, opVersions, opBeat, opFetch, opWait, opWatch:
		return false
	}
	return true
}

func (o op) String() string {
	var b strings.Builder
	name := o.ws
	if name == "" {
		name = "global"
	}
	fmt.Fprintf(&b, "%d.%d", o.client, o.n)
	if o.gap > 0 {
		fmt.Fprintf(&b, " after %v", o.gap)
	}
	fmt.Fprintf(&b, " %s %s", o.kind, name)
	for _, k := range slices.Sorted(maps.Keys(o.set)) {
		fmt.Fprintf(&b, " %s=%s", k, o.set[k])
	}
	for _, k := range o.unset {
		fmt.Fprintf(&b, " -%s", k)
	}
	if o.version > 0 {
		fmt.Fprintf(&b, " version %d", o.version)
	}
	for _, k := range slices.Sorted(maps.Keys(o.fields)) {
		fmt.Fprintf(&b, " %s=%s", k, o.fields[k])
	}
	for _, flag := range []struct {
		set  bool
		name string
	}{
		{o.nextStart, "next-start"}, {o.live, "live"}, {o.missing && (o.kind == opUnset || o.kind == opDelete), "allow-missing"},
		{o.keep && o.kind == opDelete, "keep-volumes"}, {o.etag != "" && o.takesEtag(), "etag=" + o.etag},
		{o.validate && o.changes(), "validate-only"}, {o.retry && o.changes(), "retry"}, {o.again && o.changes(), "again"},
		{o.waitFor != "", "for=" + o.waitFor}, {o.away > 0, "away=" + o.away.String()},
		{o.timeout != 30*time.Second, "timeout=" + o.timeout.String()},
	} {
		if flag.set {
			b.WriteString(" " + flag.name)
		}
	}
	return b.String()
}

func (o *op) takesEtag() bool {
	switch o.kind {
	case opUpdate, opDelete:
		return true
	case opSet, opUnset, opRollBack:
		return true
	}
	return false
}

// versions reports whether it is about a version of a secret.
func (o *op) versions() bool {
	switch o.kind {
	case opRollBack, opEnable, opDisable, opDestroy:
		return true
	}
	return false
}
