package linear

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Kind is what an operation does.
type Kind string

// The kinds. A scope is Op.Workspace; where it is empty it is all workspaces.
const (
	// Create makes a workspace, with Op.Set as its first secrets.
	Create Kind = "Create"
	// Set sets the one secret in Op.Set.
	Set Kind = "Set"
	// Delete deletes the one secret in Op.Delete.
	Delete Kind = "Delete"
	// Batch sets and deletes several.
	Batch Kind = "Batch"
	// Restart, Stop and Start are of a workspace.
	Restart Kind = "Restart"
	Stop    Kind = "Stop"
	Start   Kind = "Start"

	// List lists a scope's secrets, Secret asks for the one that Op.Key names.
	List   Kind = "List"
	Secret Kind = "Secret"
	// Get reads a workspace.
	Get Kind = "Get"
	// Wait waits for Op.Generation of a workspace.
	Wait Kind = "Wait"
	// Launch is what a container was started with.
	Launch Kind = "Launch"
)

// changes reports whether an operation without an answer may have done
// something.
func (k Kind) changes() bool {
	switch k {
	case List, Secret, Get, Wait, Launch:
		return false
	}
	return true
}

// Op is an operation.
type Op struct {
	Kind      Kind
	Workspace string            // its id; empty: the global scope
	Image     string            // Create's
	Set       map[string]string // Create's, Set's and Batch's
	Delete    []string          // Delete's and Batch's
	Key       string            // Secret's
	// NextStart: the change of secrets makes no generation.
	NextStart bool
	// IfVersion, when not 0, is the version that the one secret of Set or Delete
	// must have.
	IfVersion int64
	// AllowMissing: Delete's key need not be there.
	AllowMissing bool
	// Generation is Wait's; 0: the newest one when it was called.
	Generation int64
}

// String returns the operation for a person to read, values included.
func (o Op) String() string {
	var b strings.Builder
	b.WriteString(string(o.Kind))
	if o.Workspace != "" {
		b.WriteString(" " + o.Workspace)
	} else {
		b.WriteString(" global")
	}
	for _, k := range slices.Sorted(maps.Keys(o.Set)) {
		fmt.Fprintf(&b, " %s=%s", k, o.Set[k])
	}
	for _, k := range o.Delete {
		fmt.Fprintf(&b, " -%s", k)
	}
	if o.Key != "" {
		b.WriteString(" " + o.Key)
	}
	if o.NextStart {
		b.WriteString(" next-start")
	}
	if o.IfVersion != 0 {
		fmt.Fprintf(&b, " if-version=%d", o.IfVersion)
	}
	if o.AllowMissing {
		b.WriteString(" allow-missing")
	}
	if o.Generation != 0 {
		fmt.Fprintf(&b, " generation>=%d", o.Generation)
	}
	return b.String()
}

// Outcome is how an operation ended.
type Outcome string

// The outcomes.
const (
	// Done: it was answered, as Result says.
	Done Outcome = ""
	// NotFound: there is no such secret, and nothing was changed.
	NotFound Outcome = "not found"
	// Mismatch: the secret has not the version of Op.IfVersion, and nothing was
	// changed.
	Mismatch Outcome = "version mismatch"
	// Parked: the workspace is stopped, and nothing was changed.
	Parked Outcome = "parked"
	// Exists: there is such a workspace already, and nothing was changed.
	Exists Outcome = "exists"
	// Ahead: Wait's generation does not exist yet.
	Ahead Outcome = "ahead"
	// Unknown: it was not answered. It may have been done or not.
	Unknown Outcome = "unknown"
)

// Result is what an operation's caller was told.
type Result struct {
	Outcome Outcome
	// Generation is the workspace's: a change's, Get's, Wait's; Launch's is what
	// the container's values belong to.
	Generation int64
	// Observed is Get's and Wait's observed generation.
	Observed int64
	// Parked is Get's and Wait's.
	Parked bool
	// Changed is a change's.
	Changed bool
	// Affected is how many workspaces a change of global secrets reached.
	Affected int
	// Versions are those of the secrets that a change set or that were listed, by
	// key.
	Versions map[string]int64
	// Env is what a container was started with. Variables that are no secrets' keys
	// in the history don't matter.
	Env map[string]string
}

func (r Result) describe(k Kind) string {
	if r.Outcome != Done {
		return string(r.Outcome)
	}
	var b strings.Builder
	if k != List && k != Secret {
		fmt.Fprintf(&b, "generation %d", r.Generation)
	}
	switch k {
	case Get, Wait:
		fmt.Fprintf(&b, ", observed %d", r.Observed)
		if r.Parked {
			b.WriteString(", parked")
		}
	case Launch:
	case List, Secret:
	default:
		fmt.Fprintf(&b, ", changed %t", r.Changed)
		if r.Affected != 0 {
			fmt.Fprintf(&b, ", affected %d", r.Affected)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(r.Versions)) {
		fmt.Fprintf(&b, " %s@%d", key, r.Versions[key])
	}
	for _, key := range slices.Sorted(maps.Keys(r.Env)) {
		fmt.Fprintf(&b, " %s=%s", key, r.Env[key])
	}
	return strings.TrimSpace(b.String())
}
