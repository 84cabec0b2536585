package server

import (
	"maps"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
	"github.com/workspaced/workspaced/store/seal"
)

// workspaceToProto shows a record to a caller.
func workspaceToProto(w *store.Workspace) *workspacev1.Workspace {
	state, reconciling := workspace.StateOf(w)
	st := &w.Status
	p := &workspacev1.Workspace{
		Name:               workspaceName(w.ID),
		Uid:                w.UID,
		Labels:             w.Labels,
		Spec:               specToProto(&w.Spec),
		Model:              w.Model,
		Etag:               w.Etag(),
		CreateTime:         timeToProto(w.CreateTime),
		UpdateTime:         timeToProto(w.UpdateTime),
		State:              stateToProto(state),
		Reconciling:        reconciling,
		Generation:         w.Generation,
		ObservedGeneration: st.ObservedGeneration,
		StartingGeneration: st.StartingGeneration,
		Parked:             w.Parked,
		ChangeReason:       workspacev1.ChangeReason(workspacev1.ChangeReason_value["CHANGE_REASON_"+string(w.ChangeReason)]),
		RestartCount:       st.RestartCount,
		LastExit:           exitToProto(st.LastExit),
		LastError:          failureToProto(st.Failure, w.Parked || w.Deleting != nil || !reconciling),
	}
	if r := st.Running; r != nil {
		p.ImageDigest = r.ImageDigest
		p.ContainerId = r.InstanceID
		p.Pid = int32(r.PID)
		p.StartTime = timeToProto(r.StartTime)
		p.SecretVersions = r.SecretVersions
		p.GlobalSecrets = r.GlobalSecrets
	}
	return p
}

// What store.CrashRestart and store.SecurityProfile leave out.
const (
	crashRestartPrefix = "CRASH_RESTART_"
	securityPrefix     = "SECURITY_PROFILE_"
)

func stateToProto(s workspace.State) workspacev1.WorkspaceState {
	return workspacev1.WorkspaceState(workspacev1.WorkspaceState_value[statePrefix+string(s)])
}

func exitToProto(e *store.Exit) *workspacev1.LastExit {
	if e == nil {
		return nil
	}
	p := &workspacev1.LastExit{
		OomKilled: e.OOMKilled,
		ExitTime:  timeToProto(e.Time),
		CodeKnown: e.Known,
	}
	if e.Known {
		p.Code = int32(e.Code)
	}
	if e.Signal != 0 {
		p.Signal = unix.SignalName(syscall.Signal(e.Signal))
	}
	return p
}

// failureToProto leaves out the next attempt of a workspace at rest: none comes.
func failureToProto(f *store.Failure, atRest bool) *workspacev1.LastError {
	if f == nil {
		return nil
	}
	p := &workspacev1.LastError{
		Reason:     f.Reason,
		Message:    f.Message,
		Attempt:    int32(f.Attempt),
		Generation: f.Generation,
		FailTime:   timeToProto(f.Time),
	}
	if !atRest {
		p.NextAttemptTime = timeToProto(f.NextAttempt)
	}
	return p
}

func specToProto(s *store.Spec) *workspacev1.WorkspaceSpec {
	p := &workspacev1.WorkspaceSpec{
		Image:        s.Image,
		Command:      s.Command,
		Args:         s.Args,
		Env:          s.Env,
		WorkingDir:   s.WorkingDir,
		User:         s.User,
		ReadOnlyRoot: s.ReadOnlyRoot,
		StopSignal:   s.StopSignal,
		ModelEnv:     s.ModelEnv,
		WorkspaceApi: s.WorkspaceAPI,

		SecretDelivery:  deliveryToProto(s.SecretDelivery),
		SecurityProfile: workspacev1.SecurityProfile(workspacev1.SecurityProfile_value[securityPrefix+string(s.Security)]),
		LiveSignal:      s.LiveSignal,
	}
	if s.Resources != (store.Resources{}) {
		p.Resources = &workspacev1.Resources{
			CpuMillis:   s.Resources.CPUMillis,
			MemoryBytes: s.Resources.MemoryBytes,
			Pids:        s.Resources.Pids,
		}
	}
	for _, v := range s.Volumes {
		pv := &workspacev1.Volume{MountPath: v.MountPath, ReadOnly: v.ReadOnly}
		if v.Name != "" {
			pv.Source = &workspacev1.Volume_VolumeName{VolumeName: v.Name}
		} else {
			pv.Source = &workspacev1.Volume_HostPath{HostPath: v.HostPath}
		}
		p.Volumes = append(p.Volumes, pv)
	}
	if s.StopGrace != nil {
		p.StopGracePeriod = durationpb.New(*s.StopGrace)
	}
	if c := s.CrashPolicy; c != (store.CrashPolicy{}) {
		p.CrashPolicy = &workspacev1.CrashPolicy{
			Restart:    workspacev1.CrashRestart(workspacev1.CrashRestart_value[crashRestartPrefix+string(c.Restart)]),
			MaxRetries: int32(c.MaxRetries),
		}
	}
	return p
}

// specFromProto expects a spec that was validated. What is empty becomes nil, so
// that equal specs are equal.
func specFromProto(p *workspacev1.WorkspaceSpec) store.Spec {
	s := store.Spec{
		Image:      p.GetImage(),
		Command:    cloneList(p.GetCommand()),
		Args:       cloneList(p.GetArgs()),
		Env:        cloneMap(p.GetEnv()),
		WorkingDir: p.GetWorkingDir(),
		User:       p.GetUser(),
		Resources: store.Resources{
			CPUMillis:   p.GetResources().GetCpuMillis(),
			MemoryBytes: p.GetResources().GetMemoryBytes(),
			Pids:        p.GetResources().GetPids(),
		},
		ReadOnlyRoot: p.GetReadOnlyRoot(),
		ModelEnv:     cloneList(p.GetModelEnv()),
		WorkspaceAPI: p.GetWorkspaceApi(),
		StopSignal:   p.GetStopSignal(),

		SecretDelivery: deliveryFromProto(p.GetSecretDelivery()),
		LiveSignal:     p.GetLiveSignal(),
	}
	if p.GetSecurityProfile() != workspacev1.SecurityProfile_SECURITY_PROFILE_UNSPECIFIED {
		s.Security = store.SecurityProfile(strings.TrimPrefix(p.GetSecurityProfile().String(), securityPrefix))
	}
	for _, v := range p.GetVolumes() {
		s.Volumes = append(s.Volumes, store.Volume{
			MountPath: v.GetMountPath(),
			HostPath:  v.GetHostPath(),
			Name:      v.GetVolumeName(),
			ReadOnly:  v.GetReadOnly(),
		})
	}
	if d := p.GetStopGracePeriod(); d != nil {
		grace := d.AsDuration()
		s.StopGrace = &grace
	}
	if c := p.GetCrashPolicy(); c != nil {
		s.CrashPolicy.MaxRetries = int(c.GetMaxRetries())
		if c.GetRestart() != workspacev1.CrashRestart_CRASH_RESTART_UNSPECIFIED {
			s.CrashPolicy.Restart = store.CrashRestart(strings.TrimPrefix(c.GetRestart().String(), crashRestartPrefix))
		}
	}
	return s
}

func cloneList(l []string) []string {
	if len(l) == 0 {
		return nil
	}
	return slices.Clone(l)
}

func cloneMap(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return maps.Clone(m)
}

func secretToProto(s *store.Secret) *workspacev1.Secret {
	scope := workspacev1.SecretScope_SECRET_SCOPE_WORKSPACE
	if s.WorkspaceID == "" {
		scope = workspacev1.SecretScope_SECRET_SCOPE_GLOBAL
	}
	return &workspacev1.Secret{
		Name:       secretName(s.WorkspaceID, s.Key),
		Key:        s.Key,
		Scope:      scope,
		Version:    s.Version,
		SizeBytes:  int64(s.Size),
		CreateTime: timeToProto(s.CreateTime),
		UpdateTime: timeToProto(s.UpdateTime),
		Etag:       s.Etag(),
		Delivery:   deliveryToProto(s.Delivery),
	}
}

// deliveryPrefix is what store.Delivery leaves out.
const deliveryPrefix = "SECRET_DELIVERY_"

func deliveryToProto(d store.Delivery) workspacev1.SecretDelivery {
	return workspacev1.SecretDelivery(workspacev1.SecretDelivery_value[deliveryPrefix+string(d)])
}

func deliveryFromProto(d workspacev1.SecretDelivery) store.Delivery {
	if d == workspacev1.SecretDelivery_SECRET_DELIVERY_UNSPECIFIED {
		return ""
	}
	return store.Delivery(strings.TrimPrefix(d.String(), deliveryPrefix))
}

func versionToProto(v *store.SecretVersion) *workspacev1.SecretVersion {
	return &workspacev1.SecretVersion{
		Name:            versionName(v.WorkspaceID, v.Key, v.Version),
		Version:         v.Version,
		State:           workspacev1.SecretVersionState(workspacev1.SecretVersionState_value["SECRET_VERSION_STATE_"+string(v.State)]),
		Current:         v.Current,
		SizeBytes:       int64(v.Size),
		CreateTime:      timeToProto(v.CreateTime),
		RestoredVersion: v.Restored,
		Delivery:        deliveryToProto(v.Delivery),
	}
}

func secretsToProto(secrets []store.Secret) []*workspacev1.Secret {
	ps := make([]*workspacev1.Secret, len(secrets))
	for i := range secrets {
		ps[i] = secretToProto(&secrets[i])
	}
	return ps
}

func secretsFromProto(ps []*workspacev1.SecretValue) []store.SecretValue {
	values := make([]store.SecretValue, len(ps))
	for i, p := range ps {
		values[i] = store.SecretValue{Key: p.GetKey(), Value: seal.New(payloadOf(p)), Delivery: deliveryFromProto(p.GetDelivery())}
	}
	return values
}

// payload is what the messages that carry a secret's value have in common.
type payload interface {
	GetText() string
	GetData() []byte
	GetDelivery() workspacev1.SecretDelivery
}

// payloadOf returns the value, from whichever field carries it.
func payloadOf(p payload) []byte {
	if data := p.GetData(); data != nil {
		return data
	}
	return []byte(p.GetText())
}

// timeToProto leaves the zero time unset.
func timeToProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
