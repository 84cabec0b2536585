package kek_test

import (
	"context"
	"hash/crc32"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/workspaced/workspaced/store/seal"
	"github.com/workspaced/workspaced/store/seal/kek"
)

const gcpRing = "projects/p/locations/global/keyRings/r/cryptoKeys/"

// gcpKMS is Google's service as its .proto has it, for the keys one and two.
type gcpKMS struct {
	kmspb.UnimplementedKeyManagementServiceServer
	keys  map[string]*seal.Local
	calls atomic.Int64

	mu    sync.Mutex
	fault string
}

func checksum(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))))
}

func (k *gcpKMS) begin(ctx context.Context, name, quote string) (*seal.Local, string, error) {
	k.calls.Add(1)
	k.mu.Lock()
	fault := k.fault
	k.mu.Unlock()
	if code, ok := map[string]codes.Code{
		"400": codes.InvalidArgument, "403": codes.PermissionDenied, "404": codes.NotFound, "429": codes.ResourceExhausted, "500": codes.Internal, "503": codes.Unavailable,
	}[fault]; ok {
		return nil, fault, status.Errorf(code, "no: %s", strings.ToValidUTF8(quote, "?"))
	}
	if fault == "hang" {
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Second):
		}
		return nil, fault, ctx.Err()
	}
	key := k.keys[strings.TrimPrefix(name, gcpRing)]
	if key == nil {
		return nil, fault, status.Errorf(codes.NotFound, "CryptoKey %s not found.", name)
	}
	return key, fault, nil
}

func (k *gcpKMS) Encrypt(ctx context.Context, r *kmspb.EncryptRequest) (*kmspb.EncryptResponse, error) {
	key, fault, err := k.begin(ctx, r.GetName(), string(r.GetPlaintext()))
	if err != nil {
		return nil, err
	}
	sealed, err := key.EncryptWithContext(ctx, r.GetPlaintext(), r.GetAdditionalAuthenticatedData())
	if err != nil {
		return nil, err
	}
	switch fault {
	case "empty":
		return &kmspb.EncryptResponse{}, nil
	case "garbage":
		sealed = append([]byte("garbage"), sealed...)
		return &kmspb.EncryptResponse{Name: r.GetName(), Ciphertext: sealed, CiphertextCrc32C: wrapperspb.Int64(1), VerifiedPlaintextCrc32C: true, VerifiedAdditionalAuthenticatedDataCrc32C: true}, nil
	}
	return &kmspb.EncryptResponse{
		Name: r.GetName() + "/cryptoKeyVersions/1", Ciphertext: sealed, CiphertextCrc32C: checksum(sealed),
		VerifiedPlaintextCrc32C:                   r.GetPlaintextCrc32C().GetValue() == checksum(r.GetPlaintext()).GetValue(),
		VerifiedAdditionalAuthenticatedDataCrc32C: r.GetAdditionalAuthenticatedDataCrc32C().GetValue() == checksum(r.GetAdditionalAuthenticatedData()).GetValue(),
	}, nil
}

func (k *gcpKMS) Decrypt(ctx context.Context, r *kmspb.DecryptRequest) (*kmspb.DecryptResponse, error) {
	key, fault, err := k.begin(ctx, r.GetName(), string(r.GetCiphertext()))
	if err != nil {
		return nil, err
	}
	plain, err := key.DecryptWithContext(ctx, r.GetCiphertext(), r.GetAdditionalAuthenticatedData())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "Decryption failed: verify that 'name' refers to the correct CryptoKey.")
	}
	switch fault {
	case "no decrypt":
		return nil, status.Error(codes.PermissionDenied, "Permission 'cloudkms.cryptoKeyVersions.useToDecrypt' denied")
	case "empty":
		return &kmspb.DecryptResponse{}, nil
	case "garbage":
		return &kmspb.DecryptResponse{Plaintext: plain, PlaintextCrc32C: wrapperspb.Int64(1)}, nil
	case "other plaintext":
		plain = []byte("something else")
	}
	return &kmspb.DecryptResponse{Plaintext: plain, PlaintextCrc32C: checksum(plain), UsedPrimary: true}, nil
}

func gcpPlace(t *testing.T) place {
	k := &gcpKMS{keys: map[string]*seal.Local{}}
	for _, name := range []string{"one", "two"} {
		k.keys[name] = must(seal.Parse(name, []byte(newKeyset(t))))(t)
	}
	server := grpc.NewServer()
	kmspb.RegisterKeyManagementServiceServer(server, k)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	open := func(ctx context.Context, key string) (seal.KEK, error) {
		return kek.OpenGCP(ctx, "gcp-kms://"+gcpRing+key,
			option.WithEndpoint(l.Addr().String()), option.WithoutAuthentication(), option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	}
	return place{
		open:   func(t *testing.T, key string) (seal.KEK, error) { return open(t.Context(), key) },
		opened: func(t *testing.T, ctx context.Context, key string) seal.KEK { return must(open(ctx, key))(t) },
		remote: &remote{
			fault: func(f string) { k.mu.Lock(); defer k.mu.Unlock(); k.fault = f },
			stop:  server.Stop,
			asked: func() (int, bool) { return int(k.calls.Load()), false },
		},
	}
}
