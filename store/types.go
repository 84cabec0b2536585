package store

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/workspaced/workspaced/store/seal"
)

// Workspace is a workspace's record. API calls write everything but Status,
// the workspace's actor writes Status and nothing else.
//
// The strings of one that was read are parts of one copy of its row: who keeps a
// few of them for long clones them.
type Workspace struct {
	ID     string            `json:"id"`
	UID    string            `json:"uid"`
	Labels map[string]string `json:"labels,omitempty"`
	Spec   Spec              `json:"spec"`
	Model  string            `json:"model,omitempty"`
	// Parked is true from StopWorkspace to StartWorkspace.
	Parked bool `json:"parked,omitempty"`
	// Deleting is set once the deletion is durable.
	Deleting *Deleting `json:"deleting,omitempty"`

	// Generation counts the changes that a container must see, from 1.
	Generation int64 `json:"generation"`
	// SpecGeneration is the generation of the last change that a container must
	// be prepared anew for; what came after it (secrets, model, restarts) is
	// read at the switch.
	SpecGeneration int64 `json:"specGeneration"`
	// Live is how many of the newest generations, in a row, are of changes that the
	// container of the one before takes in as it runs.
	Live int64 `json:"live,omitempty"`
	// ChangeReason says why the newest generation was made.
	ChangeReason ChangeReason `json:"changeReason"`
	// PendingSince is when the oldest change that no container has yet seen was
	// made; zero when there is none.
	PendingSince time.Time `json:"pendingSince,omitzero"`

	CreateTime time.Time `json:"createTime"`
	UpdateTime time.Time `json:"updateTime"`
	// ConfigRevision is the revision of the last change of labels, spec, model,
	// parking or deletion: the etag.
	ConfigRevision uint64 `json:"configRevision"`
	// Revision is the revision of the last change of the record, of any kind:
	// its place in the change feed.
	Revision uint64 `json:"revision"`

	Status Status `json:"status"`
}

// Etag returns the etag of what callers can change (AIP-154).
func (w *Workspace) Etag() string { return fmt.Sprintf("%q", fmt.Sprintf("%x", w.ConfigRevision)) }

// Pending reports whether the workspace is meant to run and has a generation
// that its container does not have. What a running container would take in starts
// none that is at its end.
func (w *Workspace) Pending() bool {
	return w.Deleting == nil && !w.Parked && w.Generation > w.Status.ObservedGeneration && (w.NeedsStart() || w.End() == "")
}

// StartGeneration is the newest generation that only a new container can have. One
// that has it, or a later one, takes in what came since as it runs.
func (w *Workspace) StartGeneration() int64 { return w.Generation - w.Live }

// NeedsStart reports whether only a new container can have the newest generation.
func (w *Workspace) NeedsStart() bool { return w.StartGeneration() > w.Status.ObservedGeneration }

// Deleting says that a workspace is being deleted, and how.
type Deleting struct {
	Time        time.Time `json:"time"`
	KeepVolumes bool      `json:"keepVolumes,omitempty"`
}

// Spec is what a container is made from; see workspace.v1.WorkspaceSpec.
type Spec struct {
	Image        string            `json:"image"`
	Command      []string          `json:"command,omitempty"`
	Args         []string          `json:"args,omitempty"`
	Env          map[string]string `json:"env,omitempty"`
	WorkingDir   string            `json:"workingDir,omitempty"`
	User         string            `json:"user,omitempty"`
	Resources    Resources         `json:"resources,omitzero"`
	Volumes      []Volume          `json:"volumes,omitempty"`
	ReadOnlyRoot bool              `json:"readOnlyRoot,omitempty"`
	ModelEnv     []string          `json:"modelEnv,omitempty"`
	// SecretDelivery is how the container gets the secrets of DeliverySpec: by
	// DeliveryEnv, also when empty, or DeliveryFiles.
	SecretDelivery Delivery        `json:"secretDelivery,omitempty"`
	Security       SecurityProfile `json:"security,omitempty"`

	// WorkspaceAPI: the container gets a token of its own, see InstanceToken, and a
	// way to the daemon.
	WorkspaceAPI bool `json:"workspaceAPI,omitempty"`

	// LiveSignal, StopSignal, StopGrace and CrashPolicy are the daemon's, not the
	// container's: changing them makes no generation.
	LiveSignal  string         `json:"liveSignal,omitempty"`
	StopSignal  string         `json:"stopSignal,omitempty"`
	StopGrace   *time.Duration `json:"stopGrace,omitempty"`
	CrashPolicy CrashPolicy    `json:"crashPolicy,omitzero"`
}

// SecurityProfile says what a container may do to the machine. The values are
// those of workspace.v1.SecurityProfile without the prefix.
type SecurityProfile string

// The profiles; an empty one is SecurityRestricted, and so are those of records
// made before there were any.
const (
	SecurityRestricted SecurityProfile = "RESTRICTED"
	SecurityBaseline   SecurityProfile = "BASELINE"
	SecurityPrivileged SecurityProfile = "PRIVILEGED"
)

// CrashPolicy says what follows when a container ends by itself.
type CrashPolicy struct {
	Restart CrashRestart `json:"restart,omitempty"`
	// MaxRetries is how many times in a row it is started again; 0: no limit.
	MaxRetries int `json:"maxRetries,omitempty"`
}

// CrashRestart says after which ends a container is started again. The values
// are those of workspace.v1.CrashRestart without the prefix.
type CrashRestart string

// The answers; an empty one is CrashRestartAlways.
const (
	CrashRestartAlways    CrashRestart = "ALWAYS"
	CrashRestartOnFailure CrashRestart = "ON_FAILURE"
	CrashRestartNever     CrashRestart = "NEVER"
)

// Delivery is how a container gets a secret. The values are those of
// workspace.v1.SecretDelivery without the prefix.
type Delivery string

// The ways. An empty one is, in a change of a secret, as it has been, and of a
// new key DeliverySpec; in a spec, DeliveryEnv.
const (
	DeliveryEnv   Delivery = "ENV"
	DeliveryFiles Delivery = "FILES"
	// DeliverySpec: as Spec.SecretDelivery says.
	DeliverySpec Delivery = "SPEC"
)

// stored reports whether it can be that of a row, where empty is DeliverySpec.
func (d Delivery) stored() bool { return d == "" || d == DeliveryEnv || d == DeliveryFiles }

// known is the delivery of a row.
func (d Delivery) known() Delivery { return cmp.Or(d, DeliverySpec) }

// DefaultModelEnv is the variable that carries the model when Spec.ModelEnv is
// empty.
const DefaultModelEnv = "MODEL_PROVIDER"

// DefaultStopGrace is how long a container has to end when Spec.StopGrace is
// nil.
const DefaultStopGrace = 10 * time.Second

// ModelVars returns the variables that carry the model.
func (s *Spec) ModelVars() []string {
	if len(s.ModelEnv) == 0 {
		return []string{DefaultModelEnv}
	}
	return s.ModelEnv
}

// Resources are limits; 0 names none.
type Resources struct {
	CPUMillis   int64 `json:"cpuMillis,omitempty"`
	MemoryBytes int64 `json:"memoryBytes,omitempty"`
	Pids        int64 `json:"pids,omitempty"`
}

// Volume is a host path or a named volume; exactly one of HostPath and Name is
// set.
type Volume struct {
	MountPath string `json:"mountPath"`
	HostPath  string `json:"hostPath,omitempty"`
	Name      string `json:"name,omitempty"`
	ReadOnly  bool   `json:"readOnly,omitempty"`
}

// ChangeReason says why a generation was made. The values are those of
// workspace.v1.ChangeReason without the prefix.
type ChangeReason string

// The reasons.
const (
	ReasonCreated      ChangeReason = "CREATED"
	ReasonSpec         ChangeReason = "SPEC"
	ReasonModel        ChangeReason = "MODEL"
	ReasonSecret       ChangeReason = "SECRET"
	ReasonGlobalSecret ChangeReason = "GLOBAL_SECRET"
	ReasonRestart      ChangeReason = "RESTART"
	ReasonStart        ChangeReason = "START"
)

// Status is what a workspace's actor knows and has done.
type Status struct {
	// ObservedGeneration is the generation whose values the running container has,
	// or the last one had. Written only after it has them.
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// StartingGeneration is the generation that the cycle in flight prepares; 0
	// with none in flight.
	StartingGeneration int64 `json:"startingGeneration,omitempty"`
	// Running is the container that runs; nil when none does.
	Running *Running `json:"running,omitempty"`
	// Token is that of the container that is being made, until it is the one that
	// runs or there is none; nil: it gets none.
	Token *InstanceToken `json:"token,omitempty"`
	// LastGood is the spec of the last container that ran, kept to fall back on
	// when a newer one can't be executed.
	LastGood *LastGood `json:"lastGood,omitempty"`
	// RestartCount counts the containers that replaced an earlier one.
	RestartCount int64 `json:"restartCount,omitempty"`
	// Starts counts the containers that were started.
	Starts int64 `json:"starts,omitempty"`
	// LastExit is how a container that ended by itself did so.
	LastExit *Exit `json:"lastExit,omitempty"`
	// Crashes counts how often the container of a generation ended by itself.
	Crashes Crashes `json:"crashes,omitzero"`
	// EndedGeneration is the generation of a container that ended by itself, as
	// long as nothing was started since; 0 else.
	EndedGeneration int64 `json:"endedGeneration,omitempty"`
	// Failure says why the newest cycle failed; nil after one that succeeded.
	Failure *Failure `json:"failure,omitempty"`
}

// Crashes counts ends of containers of one generation.
type Crashes struct {
	Generation int64 `json:"generation"`
	// InARow counts those without one between them that ran well for a while.
	InARow int `json:"inARow"`
}

// End says that a workspace's container has ended and why it is not started
// again. The values are those of workspace.v1.WorkspaceState without the prefix.
type End string

// The ends; an empty one is none.
const (
	// EndExited: by its crash policy the end of the container is final.
	EndExited End = "EXITED"
	// EndExhausted: it ended once more than its crash policy retries.
	EndExhausted End = "EXHAUSTED"
)

// End applies the crash policy. A workspace that is at an end is started again by
// a new generation only, or by another policy.
func (w *Workspace) End() End {
	st := &w.Status
	if st.Running != nil || st.EndedGeneration == 0 || st.EndedGeneration != st.ObservedGeneration || st.LastExit == nil {
		return ""
	}
	p := w.Spec.CrashPolicy
	switch {
	case p.Restart == CrashRestartNever, p.Restart == CrashRestartOnFailure && !st.LastExit.Failed():
		return EndExited
	case p.MaxRetries > 0 && st.Crashes.Generation == st.EndedGeneration && st.Crashes.InARow > p.MaxRetries:
		return EndExhausted
	}
	return ""
}

// Running is the container that runs.
type Running struct {
	InstanceID     string           `json:"instanceID"`
	PID            int              `json:"pid"`
	ImageDigest    string           `json:"imageDigest,omitempty"`
	StartTime      time.Time        `json:"startTime"`
	SecretVersions map[string]int64 `json:"secretVersions,omitempty"`
	// GlobalSecrets are the keys in SecretVersions that are global secrets, sorted.
	GlobalSecrets []string `json:"globalSecrets,omitempty"`
	// TokenHash is InstanceToken.Hash of this container; empty: it has no token.
	TokenHash string `json:"tokenHash,omitempty"`
}

// InstanceToken is what is known of the token by which a container is told from
// all others. It is a part of the status: so it is durable before the container
// starts, and ends with the record of the container in one transaction.
type InstanceToken struct {
	// InstanceID is the container's.
	InstanceID string `json:"instanceID"`
	// Hash is the token's SHA-256, in hex. The token itself is nowhere.
	Hash string `json:"hash"`
}

// LastGood is a generation's spec that is known to run.
type LastGood struct {
	Generation int64 `json:"generation"`
	Spec       Spec  `json:"spec"`
}

// Exit tells how a container ended; see runtime.Exit.
type Exit struct {
	Code      int       `json:"code"`
	Known     bool      `json:"known,omitempty"`
	Signal    int       `json:"signal,omitempty"`
	OOMKilled bool      `json:"oomKilled,omitempty"`
	Time      time.Time `json:"time"`
}

// Failed reports whether the container did not end well, as far as is known.
func (e *Exit) Failed() bool { return !e.Known || e.Code != 0 }

// Failure says why a cycle failed.
type Failure struct {
	// Generation is the one that could not be brought about.
	Generation int64 `json:"generation"`
	// Reason and Message may be read by callers: never a secret value.
	Reason  string    `json:"reason"`
	Message string    `json:"message"`
	Attempt int       `json:"attempt"`
	Time    time.Time `json:"time"`
	// NextAttempt is when the next cycle begins; zero: not before a change.
	NextAttempt time.Time `json:"nextAttempt,omitzero"`
}

// Secret is a secret's metadata.
type Secret struct {
	Key string
	// WorkspaceID is empty for a global secret.
	WorkspaceID string
	// Version counts the values and deliveries that the key has had, from 1; a
	// deleted key goes on counting when it is set again, so that no version names
	// two values.
	Version    int64
	Size       int
	CreateTime time.Time
	UpdateTime time.Time
	// Delivery is never empty.
	Delivery Delivery
}

// Etag returns the secret's etag (AIP-154).
func (s *Secret) Etag() string { return fmt.Sprintf("%q", fmt.Sprintf("v%d", s.Version)) }

// Limits of secrets.
const (
	// MaxValueBytes is the size of one secret's value.
	MaxValueBytes = 64 << 10
	// MaxWorkspaceBytes is the size of all values of one workspace.
	MaxWorkspaceBytes = 1 << 20
	// MaxGlobalBytes is the size of all global values. Both together, with the
	// largest plain environment, stay below what execve takes.
	MaxGlobalBytes = 256 << 10
)

// Scope says who gets a secret: a workspace's id, or nobody in particular.
// The zero value is the global scope.
type Scope struct{ WorkspaceID string }

// Global reports whether the scope is every workspace.
func (s Scope) Global() bool { return s.WorkspaceID == "" }

// SecretValue is a key and its new value.
type SecretValue struct {
	Key   string
	Value seal.Plaintext
	// Delivery is how containers get it; empty: as it has been.
	Delivery Delivery
}

// Snapshot is what a container is started from: one read transaction.
type Snapshot struct {
	Workspace Workspace
	// Secrets are the global and the workspace's own ones merged, own ones
	// winning, by key.
	Secrets []OpenedSecret
	// Staged are the keys, of secrets that are there or were, whose last change waits
	// for the next start: what a running container has under them stays.
	Staged []string
}

// Hidden reports whether a container of the spec has the model under the key, and not
// the global secret: the workspace's own one can't have that key.
func (sn *Snapshot) Hidden(spec *Spec, key string) bool {
	return sn.Workspace.Model != "" && slices.Contains(spec.ModelVars(), key)
}

// OpenedSecret is a secret's value on its way into a container.
type OpenedSecret struct {
	Key      string
	Version  int64
	Value    seal.Plaintext
	Delivery Delivery // never empty
	Global   bool
}

// File reports whether a container of the spec gets it as a file.
func (s *OpenedSecret) File(spec *Spec) bool { return deliversFile(s.Delivery, spec) }

func deliversFile(d Delivery, spec *Spec) bool {
	if d == DeliverySpec && spec != nil {
		d = spec.SecretDelivery
	}
	return d == DeliveryFiles
}

// Options belong to one change.
type Options struct {
	// RequestID makes the change idempotent for an hour; empty: it is not.
	RequestID string
	// Fingerprint tells one request from another under the same RequestID: the
	// method and the whole request, deterministically. It may contain secrets: it
	// is stored sealed.
	Fingerprint []byte
	// ValidateOnly rolls the change back after everything was checked.
	ValidateOnly bool
	// Etag, when set, must be the current one.
	Etag string
	// AllowMissing: deleting what is not there is done already. DeleteWorkspace's.
	AllowMissing bool
	// Allow is asked inside the transaction about the workspace as it is before the
	// change; its error comes back as it is, and nothing is changed. It must be quick
	// and must not call the store. nil: nobody is asked.
	Allow func(*Workspace) error
	// Audit is for the audit log: who asks for the change, by which call. What it has
	// done the store adds, and writes the entry in the change's own transaction, or,
	// when nothing is written, later. Of a change that fails there is no entry. Nil:
	// there is none at all.
	Audit *AuditEntry
}

func (o *Options) fingerprint() [sha256.Size]byte { return sha256.Sum256(o.Fingerprint) }

// Result is a change's outcome.
type Result struct {
	// Workspace is the record after the change; zero for global secrets.
	Workspace Workspace
	// Secrets are the metadata of the secrets that were set or rolled back, in their
	// order.
	Secrets []Secret
	// Version is the one whose state was set.
	Version SecretVersion `json:",omitzero"`
	// Changed is false when everything had the asked-for value already.
	Changed bool
	// Affected counts the workspaces that got a new generation.
	Affected int
	// KeyID is the id of the data key that RotateKey has made.
	KeyID uint32 `json:",omitempty"`
}

// Change tells, after a commit, that a workspace's record is another one now.
type Change struct {
	ID  string
	UID string
	// Revision is the commit's place in the change feed.
	Revision uint64
	// Desired: the actor has to look.
	Desired bool
	// Interrupt: an effect in flight has to end, the workspace was stopped or
	// deleted.
	Interrupt bool
}

// Errors that callers tell apart with errors.Is and errors.As. Every other error
// of the store is internal.
var (
	// ErrNotFound: no such workspace or secret; comes as *NotFoundError.
	ErrNotFound = errors.New("not found")
	// ErrExists: the id is taken.
	ErrExists = errors.New("already exists")
	// ErrEtag: the etag is not the current one.
	ErrEtag = errors.New("etag mismatch")
	// ErrDeleting: the workspace is being deleted.
	ErrDeleting = errors.New("workspace is being deleted")
	// ErrParked: the workspace is stopped.
	ErrParked = errors.New("workspace is stopped")
	// ErrRequestReused: another request had that request id.
	ErrRequestReused = errors.New("request id was used by another request")
	// ErrTooLarge: a quota of secrets is used up; comes as *QuotaError.
	ErrTooLarge = errors.New("too large")
	// ErrModelKey: a secret's key and one of model_env are the same; comes as
	// *KeyError.
	ErrModelKey = errors.New("key carries the model")
	// ErrNeedsFiles: a value with a NUL would go into an environment; comes as
	// *KeyError.
	ErrNeedsFiles = errors.New("value with a NUL needs to be delivered as a file")
	// ErrNotLive: a running container has the secret as a variable, or would; comes
	// as *KeyError.
	ErrNotLive = errors.New("variable can't be changed while the container runs")
	// ErrUnreadable: a secret can't be opened; comes as *KeyError.
	ErrUnreadable = errors.New("secret can't be opened")
	// ErrVersionCurrent: it is the version that containers get; comes as
	// *VersionError.
	ErrVersionCurrent = errors.New("version is the current one")
	// ErrVersionDisabled: the version is disabled; comes as *VersionError.
	ErrVersionDisabled = errors.New("version is disabled")
	// ErrVersionDestroyed: the version's value is gone; comes as *VersionError.
	ErrVersionDestroyed = errors.New("version is destroyed")
	// ErrDiskFull: nothing was written; reading goes on.
	ErrDiskFull = errors.New("disk full")
	// ErrClosed: the store is closed.
	ErrClosed = errors.New("store is closed")
)

// NotFoundError names what is missing.
type NotFoundError struct {
	WorkspaceID string // empty for a global secret
	Key         string // empty for a workspace
	Version     int64  // 0 for a workspace and for a secret
}

func (e *NotFoundError) Error() string {
	version := ""
	if e.Version != 0 {
		version = fmt.Sprintf("version %d of ", e.Version)
	}
	switch {
	case e.Key == "":
		return fmt.Sprintf("workspace %q not found", e.WorkspaceID)
	case e.WorkspaceID == "":
		return fmt.Sprintf("%sglobal secret %q not found", version, e.Key)
	}
	return fmt.Sprintf("%ssecret %q of workspace %q not found", version, e.Key, e.WorkspaceID)
}

// Is reports that the error is an ErrNotFound.
func (e *NotFoundError) Is(target error) bool { return target == ErrNotFound }

// KeyError names a key.
type KeyError struct {
	Key string
	Err error // ErrModelKey, ErrNeedsFiles, ErrNotLive or ErrUnreadable
}

func (e *KeyError) Error() string { return fmt.Sprintf("secret %q: %v", e.Key, e.Err) }

// Unwrap returns Err.
func (e *KeyError) Unwrap() error { return e.Err }

// VersionError names a version of a secret.
type VersionError struct {
	Key     string
	Version int64
	Err     error // ErrVersionCurrent, ErrVersionDisabled, ErrVersionDestroyed or ErrUnreadable
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("version %d of secret %q: %v", e.Version, e.Key, e.Err)
}

// Unwrap returns Err.
func (e *VersionError) Unwrap() error { return e.Err }

// QuotaError says which limit a change would exceed.
type QuotaError struct {
	Scope       Scope
	Limit, Size int // bytes
}

func (e *QuotaError) Error() string {
	return fmt.Sprintf("secrets would take %d bytes, the limit is %d", e.Size, e.Limit)
}

// Is reports that the error is an ErrTooLarge.
func (e *QuotaError) Is(target error) bool { return target == ErrTooLarge }
