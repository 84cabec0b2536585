package store

import (
	"cmp"
	"encoding/json"
	"reflect"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"
)

// Records are JSON, and encoding/json says what that means. The records that
// every call reads have a second, faster way there and back, without reflection:
// each describes its fields once, in order, in a method code, and a codec writes
// or reads by that description.
//
// What it writes is what encoding/json would write, byte for byte. What it reads
// it takes only in that form, fields in order and no space between: of all else,
// like a record of another time, it says no, and encoding/json reads it. The tests
// hold both to the same results.

// coded is a record that has a description.
type coded interface{ code(*codec) }

// codec writes into out, or reads in. Reading copies the row once, and all strings
// of the record are parts of that copy.
type codec struct {
	reading bool
	in      string
	pos     int
	refused bool // in is not of the expected form
	out     []byte
	err     error // in writing
}

// encodeRecord returns v as JSON.
func encodeRecord(v any) ([]byte, error) { return appendRecord(make([]byte, 0, 1024), v) }

// appendRecord appends it to b.
func appendRecord(b []byte, v any) ([]byte, error) {
	r, ok := v.(coded)
	if !ok {
		row, err := json.Marshal(v)
		return append(b, row...), err
	}
	c := codec{out: b}
	r.code(&c)
	return c.out, c.err
}

// decodeRecord decodes into v, which points to a zero value.
func decodeRecord(b []byte, v any) error {
	r, ok := v.(coded)
	if !ok {
		return json.Unmarshal(b, v)
	}
	return decodeCoded(string(b), r)
}

// decodeCoded is decodeRecord for a row that was copied; v keeps it.
func decodeCoded(row string, v coded) error {
	c := codec{reading: true, in: row}
	v.code(&c)
	if !c.refused && c.pos == len(c.in) {
		return nil
	}
	reflect.ValueOf(v).Elem().SetZero()
	return json.Unmarshal([]byte(row), v)
}

// begin and end enclose an object.
func (c *codec) begin() { c.mark('{') }
func (c *codec) end()   { c.mark('}') }

// mark writes or reads a character.
func (c *codec) mark(b byte) {
	switch {
	case !c.reading:
		c.out = append(c.out, b)
	case !c.next(b):
		c.refused = true
	}
}

// next reads a character if it is the next one.
func (c *codec) next(b byte) bool {
	if c.pos < len(c.in) && c.in[c.pos] == b {
		c.pos++
		return true
	}
	return false
}

// field reports whether the field's value follows: in writing if it is to be
// there, in reading if it is.
func (c *codec) field(name string, there bool) bool {
	if !c.reading {
		if there {
			if c.out[len(c.out)-1] != '{' {
				c.out = append(c.out, ',')
			}
			c.out = append(c.out, '"')
			c.out = append(c.out, name...)
			c.out = append(c.out, '"', ':')
		}
		return there
	}
	if c.refused {
		return false
	}
	rest := c.in[c.pos:]
	if c.pos > 0 && c.in[c.pos-1] != '{' {
		if rest == "" || rest[0] != ',' {
			return false
		}
		rest = rest[1:]
	}
	n := len(name)
	if len(rest) < n+3 || rest[0] != '"' || rest[1:n+1] != name || rest[n+1:n+3] != `":` {
		return false
	}
	c.pos = len(c.in) - len(rest) + n + 3
	return true
}

// plain are the characters that stand for themselves in a string.
var plain = func() (t [256]bool) {
	for b := ' '; b < utf8.RuneSelf; b++ {
		t[b] = b != '"' && b != '\\' && b != '<' && b != '>' && b != '&' && b != 0x7f
	}
	return t
}()

func text[S ~string](c *codec, v *S) {
	if c.reading {
		*v = S(c.readText())
		return
	}
	c.writeText(string(*v))
}

// writeText and readText leave a string with escapes, or not in ASCII, to
// encoding/json.
func (c *codec) writeText(s string) {
	for i := range len(s) {
		if !plain[s[i]] {
			b, err := json.Marshal(s)
			c.out, c.err = append(c.out, b...), cmp.Or(c.err, err)
			return
		}
	}
	c.out = append(c.out, '"')
	c.out = append(c.out, s...)
	c.out = append(c.out, '"')
}

func (c *codec) readText() string {
	begin := c.pos
	c.mark('"')
	simple := true
	for ; c.pos < len(c.in) && c.in[c.pos] != '"'; c.pos++ {
		if !plain[c.in[c.pos]] {
			simple = false
			if c.in[c.pos] == '\\' {
				c.pos++ // whatever follows, it does not end the string
			}
		}
	}
	if c.refused || c.pos >= len(c.in) {
		c.refused, c.pos = true, len(c.in)
		return ""
	}
	c.pos++
	if simple {
		return c.in[begin+1 : c.pos-1]
	}
	var s string
	if json.Unmarshal([]byte(c.in[begin:c.pos]), &s) != nil {
		c.refused = true
	}
	return s
}

// maxDigits is how many digits every int64 has room for.
const maxDigits = 18

func integer[N ~int | ~int64 | ~uint64](c *codec, v *N) {
	if !c.reading {
		if *v < 0 {
			c.out = strconv.AppendInt(c.out, int64(*v), 10)
		} else {
			c.out = strconv.AppendUint(c.out, uint64(*v), 10)
		}
		return
	}
	negative := c.next('-')
	begin, n := c.pos, int64(0)
	for ; c.pos < len(c.in) && c.in[c.pos] >= '0' && c.in[c.pos] <= '9'; c.pos++ {
		n = n*10 + int64(c.in[c.pos]-'0') // may overflow; then it is refused
	}
	digits := c.pos - begin
	if digits == 0 || digits > maxDigits || c.in[begin] == '0' && (digits > 1 || negative) {
		c.refused = true
		return
	}
	if negative {
		n = -n
	}
	*v = N(n)
	if int64(*v) != n || (*v < 0) != negative { // N has no room for it
		c.refused = true
	}
}

// boolean codes true, the only value of a bool that is written.
func boolean(c *codec, v *bool) {
	const word = "true"
	switch {
	case !c.reading:
		c.out = append(c.out, word...)
	case len(c.in)-c.pos >= len(word) && c.in[c.pos:c.pos+len(word)] == word:
		c.pos += len(word)
		*v = true
	default:
		c.refused = true
	}
}

func moment(c *codec, v *time.Time) {
	if !c.reading {
		var err error
		c.out = append(c.out, '"')
		if c.out, err = v.AppendText(c.out); err != nil {
			c.err = err
		}
		c.out = append(c.out, '"')
		return
	}
	begin := c.pos
	s := c.readText()
	if c.pos-begin != len(s)+len(`""`) || v.UnmarshalText([]byte(s)) != nil { // it had escapes, or is none
		c.refused = true
	}
}

// pointer codes what p points to, which is there.
func pointer[T any](c *codec, p **T, code func(*codec, *T)) {
	if c.reading {
		*p = new(T)
	}
	code(c, *p)
}

// list codes a list that is not empty.
func list[T any](c *codec, l *[]T, code func(*codec, *T)) {
	c.mark('[')
	if !c.reading {
		for i := range *l {
			if i > 0 {
				c.mark(',')
			}
			code(c, &(*l)[i])
		}
		c.mark(']')
		return
	}
	for more := true; more && !c.refused; more = c.next(',') {
		*l = append(*l, *new(T))
		code(c, &(*l)[len(*l)-1])
	}
	c.mark(']')
}

// table codes a map that is not empty.
func table[V any](c *codec, m *map[string]V, code func(*codec, *V)) {
	c.begin()
	if !c.reading {
		var v V
		keys := make([]string, 0, len(*m))
		for key := range *m {
			keys = append(keys, key)
		}
		slices.Sort(keys)
		for i, key := range keys {
			if i > 0 {
				c.mark(',')
			}
			c.writeText(key)
			c.mark(':')
			v = (*m)[key]
			code(c, &v)
		}
		c.end()
		return
	}
	*m = make(map[string]V)
	var v, zero V
	for more := true; more && !c.refused; more = c.next(',') {
		key := c.readText()
		c.mark(':')
		code(c, &v)
		(*m)[key], v = v, zero
	}
	c.end()
}

// The descriptions: as the types' tags say.

func (w *Workspace) code(c *codec) {
	c.begin()
	if c.field("id", true) {
		text(c, &w.ID)
	}
	if c.field("uid", true) {
		text(c, &w.UID)
	}
	if c.field("labels", len(w.Labels) > 0) {
		table(c, &w.Labels, text)
	}
	if c.field("spec", true) {
		codeSpec(c, &w.Spec)
	}
	if c.field("model", w.Model != "") {
		text(c, &w.Model)
	}
	if c.field("parked", w.Parked) {
		boolean(c, &w.Parked)
	}
	if c.field("deleting", w.Deleting != nil) {
		pointer(c, &w.Deleting, codeDeleting)
	}
	if c.field("generation", true) {
		integer(c, &w.Generation)
	}
	if c.field("specGeneration", true) {
		integer(c, &w.SpecGeneration)
	}
	if c.field("live", w.Live != 0) {
		integer(c, &w.Live)
	}
	if c.field("changeReason", true) {
		text(c, &w.ChangeReason)
	}
	if c.field("pendingSince", !w.PendingSince.IsZero()) {
		moment(c, &w.PendingSince)
	}
	if c.field("createTime", true) {
		moment(c, &w.CreateTime)
	}
	if c.field("updateTime", true) {
		moment(c, &w.UpdateTime)
	}
	if c.field("configRevision", true) {
		integer(c, &w.ConfigRevision)
	}
	if c.field("revision", true) {
		integer(c, &w.Revision)
	}
	if c.field("status", true) {
		w.Status.code(c)
	}
	c.end()
}

func codeDeleting(c *codec, d *Deleting) {
	c.begin()
	if c.field("time", true) {
		moment(c, &d.Time)
	}
	if c.field("keepVolumes", d.KeepVolumes) {
		boolean(c, &d.KeepVolumes)
	}
	c.end()
}

func codeSpec(c *codec, s *Spec) {
	c.begin()
	if c.field("image", true) {
		text(c, &s.Image)
	}
	if c.field("command", len(s.Command) > 0) {
		list(c, &s.Command, text)
	}
	if c.field("args", len(s.Args) > 0) {
		list(c, &s.Args, text)
	}
	if c.field("env", len(s.Env) > 0) {
		table(c, &s.Env, text)
	}
	if c.field("workingDir", s.WorkingDir != "") {
		text(c, &s.WorkingDir)
	}
	if c.field("user", s.User != "") {
		text(c, &s.User)
	}
	if c.field("resources", s.Resources != Resources{}) {
		codeResources(c, &s.Resources)
	}
	if c.field("volumes", len(s.Volumes) > 0) {
		list(c, &s.Volumes, codeVolume)
	}
	if c.field("readOnlyRoot", s.ReadOnlyRoot) {
		boolean(c, &s.ReadOnlyRoot)
	}
	if c.field("modelEnv", len(s.ModelEnv) > 0) {
		list(c, &s.ModelEnv, text)
	}
	if c.field("secretDelivery", s.SecretDelivery != "") {
		text(c, &s.SecretDelivery)
	}
	if c.field("security", s.Security != "") {
		text(c, &s.Security)
	}
	if c.field("workspaceAPI", s.WorkspaceAPI) {
		boolean(c, &s.WorkspaceAPI)
	}
	if c.field("liveSignal", s.LiveSignal != "") {
		text(c, &s.LiveSignal)
	}
	if c.field("stopSignal", s.StopSignal != "") {
		text(c, &s.StopSignal)
	}
	if c.field("stopGrace", s.StopGrace != nil) {
		pointer(c, &s.StopGrace, integer)
	}
	if c.field("crashPolicy", s.CrashPolicy != CrashPolicy{}) {
		codeCrashPolicy(c, &s.CrashPolicy)
	}
	c.end()
}

func codeResources(c *codec, r *Resources) {
	c.begin()
	if c.field("cpuMillis", r.CPUMillis != 0) {
		integer(c, &r.CPUMillis)
	}
	if c.field("memoryBytes", r.MemoryBytes != 0) {
		integer(c, &r.MemoryBytes)
	}
	if c.field("pids", r.Pids != 0) {
		integer(c, &r.Pids)
	}
	c.end()
}

func codeVolume(c *codec, v *Volume) {
	c.begin()
	if c.field("mountPath", true) {
		text(c, &v.MountPath)
	}
	if c.field("hostPath", v.HostPath != "") {
		text(c, &v.HostPath)
	}
	if c.field("name", v.Name != "") {
		text(c, &v.Name)
	}
	if c.field("readOnly", v.ReadOnly) {
		boolean(c, &v.ReadOnly)
	}
	c.end()
}

func codeCrashPolicy(c *codec, p *CrashPolicy) {
	c.begin()
	if c.field("restart", p.Restart != "") {
		text(c, &p.Restart)
	}
	if c.field("maxRetries", p.MaxRetries != 0) {
		integer(c, &p.MaxRetries)
	}
	c.end()
}

func (st *Status) code(c *codec) {
	c.begin()
	if c.field("observedGeneration", st.ObservedGeneration != 0) {
		integer(c, &st.ObservedGeneration)
	}
	if c.field("startingGeneration", st.StartingGeneration != 0) {
		integer(c, &st.StartingGeneration)
	}
	if c.field("running", st.Running != nil) {
		pointer(c, &st.Running, codeRunning)
	}
	if c.field("token", st.Token != nil) {
		pointer(c, &st.Token, codeToken)
	}
	if c.field("lastGood", st.LastGood != nil) {
		pointer(c, &st.LastGood, codeLastGood)
	}
	if c.field("restartCount", st.RestartCount != 0) {
		integer(c, &st.RestartCount)
	}
	if c.field("starts", st.Starts != 0) {
		integer(c, &st.Starts)
	}
	if c.field("lastExit", st.LastExit != nil) {
		pointer(c, &st.LastExit, codeExit)
	}
	if c.field("crashes", st.Crashes != Crashes{}) {
		codeCrashes(c, &st.Crashes)
	}
	if c.field("endedGeneration", st.EndedGeneration != 0) {
		integer(c, &st.EndedGeneration)
	}
	if c.field("failure", st.Failure != nil) {
		pointer(c, &st.Failure, codeFailure)
	}
	c.end()
}

func codeRunning(c *codec, r *Running) {
	c.begin()
	if c.field("instanceID", true) {
		text(c, &r.InstanceID)
	}
	if c.field("pid", true) {
		integer(c, &r.PID)
	}
	if c.field("imageDigest", r.ImageDigest != "") {
		text(c, &r.ImageDigest)
	}
	if c.field("startTime", true) {
		moment(c, &r.StartTime)
	}
	if c.field("secretVersions", len(r.SecretVersions) > 0) {
		table(c, &r.SecretVersions, integer)
	}
	if c.field("globalSecrets", len(r.GlobalSecrets) > 0) {
		list(c, &r.GlobalSecrets, text)
	}
	if c.field("tokenHash", r.TokenHash != "") {
		text(c, &r.TokenHash)
	}
	c.end()
}

func codeToken(c *codec, t *InstanceToken) {
	c.begin()
	if c.field("instanceID", true) {
		text(c, &t.InstanceID)
	}
	if c.field("hash", true) {
		text(c, &t.Hash)
	}
	c.end()
}

func codeLastGood(c *codec, g *LastGood) {
	c.begin()
	if c.field("generation", true) {
		integer(c, &g.Generation)
	}
	if c.field("spec", true) {
		codeSpec(c, &g.Spec)
	}
	c.end()
}

func codeExit(c *codec, e *Exit) {
	c.begin()
	if c.field("code", true) {
		integer(c, &e.Code)
	}
	if c.field("known", e.Known) {
		boolean(c, &e.Known)
	}
	if c.field("signal", e.Signal != 0) {
		integer(c, &e.Signal)
	}
	if c.field("oomKilled", e.OOMKilled) {
		boolean(c, &e.OOMKilled)
	}
	if c.field("time", true) {
		moment(c, &e.Time)
	}
	c.end()
}

func codeCrashes(c *codec, cr *Crashes) {
	c.begin()
	if c.field("generation", true) {
		integer(c, &cr.Generation)
	}
	if c.field("inARow", true) {
		integer(c, &cr.InARow)
	}
	c.end()
}

func codeFailure(c *codec, f *Failure) {
	c.begin()
	if c.field("generation", true) {
		integer(c, &f.Generation)
	}
	if c.field("reason", true) {
		text(c, &f.Reason)
	}
	if c.field("message", true) {
		text(c, &f.Message)
	}
	if c.field("attempt", true) {
		integer(c, &f.Attempt)
	}
	if c.field("time", true) {
		moment(c, &f.Time)
	}
	if c.field("nextAttempt", !f.NextAttempt.IsZero()) {
		moment(c, &f.NextAttempt)
	}
	c.end()
}

func (r *feedRow) code(c *codec) {
	c.begin()
	if c.field("id", true) {
		text(c, &r.ID)
	}
	if c.field("uid", r.UID != "") {
		text(c, &r.UID)
	}
	if c.field("removeTime", !r.RemoveTime.IsZero()) {
		moment(c, &r.RemoveTime)
	}
	c.end()
}

func (r *secretRecord) code(c *codec) {
	c.begin()
	if c.field("version", true) {
		integer(c, &r.Version)
	}
	if c.field("deleted", r.Deleted) {
		boolean(c, &r.Deleted)
	}
	if c.field("size", r.Size != 0) {
		integer(c, &r.Size)
	}
	if c.field("createTime", !r.CreateTime.IsZero()) {
		moment(c, &r.CreateTime)
	}
	if c.field("updateTime", !r.UpdateTime.IsZero()) {
		moment(c, &r.UpdateTime)
	}
	if c.field("delivery", r.Delivery != "") {
		text(c, &r.Delivery)
	}
	if c.field("binary", r.Binary) {
		boolean(c, &r.Binary)
	}
	if c.field("staged", r.Staged) {
		boolean(c, &r.Staged)
	}
	if c.field("variable", r.Variable) {
		boolean(c, &r.Variable)
	}
	if c.field("restored", r.Restored != 0) {
		integer(c, &r.Restored)
	}
	if c.field("older", len(r.Older) > 0) {
		list(c, &r.Older, codeVersion)
	}
	c.end()
}

func codeVersion(c *codec, v *versionRecord) {
	c.begin()
	if c.field("version", true) {
		integer(c, &v.Version)
	}
	if c.field("size", v.Size != 0) {
		integer(c, &v.Size)
	}
	if c.field("createTime", !v.CreateTime.IsZero()) {
		moment(c, &v.CreateTime)
	}
	if c.field("restored", v.Restored != 0) {
		integer(c, &v.Restored)
	}
	if c.field("delivery", v.Delivery != "") {
		text(c, &v.Delivery)
	}
	if c.field("state", v.State != "") {
		text(c, &v.State)
	}
	c.end()
}

func (e *AuditEntry) code(c *codec) {
	c.begin()
	if c.field("time", true) {
		moment(c, &e.Time)
	}
	if c.field("subject", e.Subject != "") {
		text(c, &e.Subject)
	}
	if c.field("peer", e.Peer != "") {
		text(c, &e.Peer)
	}
	if c.field("method", true) {
		text(c, &e.Method)
	}
	if c.field("resource", e.Resource != "") {
		text(c, &e.Resource)
	}
	if c.field("keys", len(e.Keys) > 0) {
		list(c, &e.Keys, text)
	}
	if c.field("code", true) {
		text(c, &e.Code)
	}
	if c.field("reason", e.Reason != "") {
		text(c, &e.Reason)
	}
	if c.field("effect", e.Effect != "") {
		text(c, &e.Effect)
	}
	if c.field("generation", e.Generation != 0) {
		integer(c, &e.Generation)
	}
	if c.field("requestID", e.RequestID != "") {
		text(c, &e.RequestID)
	}
	if c.field("callID", e.CallID != "") {
		text(c, &e.CallID)
	}
	if c.field("count", e.Count != 0) {
		integer(c, &e.Count)
	}
	if c.field("lastTime", !e.LastTime.IsZero()) {
		moment(c, &e.LastTime)
	}
	c.end()
}

func (st *auditState) code(c *codec) {
	c.begin()
	if c.field("first", true) {
		integer(c, &st.First)
	}
	if c.field("next", true) {
		integer(c, &st.Next)
	}
	if c.field("anchor", true) {
		text(c, &st.Anchor)
	}
	if c.field("head", true) {
		text(c, &st.Head)
	}
	if c.field("bytes", st.Bytes != 0) {
		integer(c, &st.Bytes)
	}
	if c.field("oldest", !st.Oldest.IsZero()) {
		moment(c, &st.Oldest)
	}
	if c.field("copied", st.Copied != 0) {
		integer(c, &st.Copied)
	}
	if c.field("mac", true) {
		text(c, &st.MAC)
	}
	c.end()
}
