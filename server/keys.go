package server

import (
	"context"
	"errors"
	"slices"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

// RotateKey implements workspace.v1.AdminControl.
//
// INVALID_ARGUMENT, FAILED_PRECONDITION, RESOURCE_EXHAUSTED, UNAVAILABLE.
func (a admin) RotateKey(ctx context.Context, req *workspacev1.RotateKeyRequest) (*workspacev1.RotateKeyResponse, error) {
	o, err := a.server.options(ctx, workspacev1.AdminControl_RotateKey_FullMethodName, req, "")
	if err != nil {
		return nil, err
	}
	r, err := a.server.store.RotateKey(ctx, o)
	if err != nil {
		return nil, err
	}
	return &workspacev1.RotateKeyResponse{KeyId: r.KeyID}, nil
}

// dataKeys are what GetServerInfo tells of the keys; nil for who is no admin.
func (s *Server) dataKeys(ctx context.Context) (*workspacev1.DataKeys, error) {
	if access.Allowed(ctx, workspacev1.Role_ROLE_ADMIN, access.Target{}) != nil {
		return nil, nil
	}
	keys, err := s.store.Keys(ctx)
	if err != nil {
		return nil, err
	}
	return dataKeysToProto(&keys), nil
}

func dataKeysToProto(keys *store.Keys) *workspacev1.DataKeys {
	p := &workspacev1.DataKeys{
		WrappedBy: keys.KEK, RotateTime: timeToProto(keys.RotateTime),
		State: workspacev1.DataKeysState_DATA_KEYS_STATE_SETTLED,
	}
	switch {
	case keys.Rotating:
		p.State = workspacev1.DataKeysState_DATA_KEYS_STATE_RESEALING
	case keys.Compacting:
		p.State = workspacev1.DataKeysState_DATA_KEYS_STATE_COMPACTING
	}
	switch {
	case keys.Problem == nil:
	case errors.Is(keys.Problem, store.ErrDiskFull):
		p.Problem = "the disk has too little room for another file beside the database"
	default:
		p.Problem = "it has failed: the daemon's log says why"
	}
	for id, records := range keys.Records {
		p.Keys = append(p.Keys, &workspacev1.DataKey{KeyId: id, Primary: id == keys.Primary, Records: records})
	}
	slices.SortFunc(p.Keys, func(a, b *workspacev1.DataKey) int { // the primary first
		switch {
		case a.GetPrimary() != b.GetPrimary() && a.GetPrimary():
			return -1
		case a.GetPrimary() != b.GetPrimary():
			return 1
		}
		return int(int64(a.GetKeyId()) - int64(b.GetKeyId()))
	})
	return p
}
